"""COCO captions and VQA v2: annotation files beside a folder of images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trichord.building.chats import ChatMembers, chat_messages
from trichord.building.lines import json_elements
from trichord.building.media import json_bytes, media_member, shown, text_bytes
from trichord.building.rows import BadRow, BuildRow
from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import FieldsConfig
from trichord.shards.quarantine import BadSample

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What LLaVA-1.5 adds to VQA questions, so that the model tells short answers from conversations."""
_IMAGE_NUMBER = re.compile(r"(\d+)$")


def rows_from_coco(
    source: Path, images: Path | None, captions: str, fields: FieldsConfig
) -> Iterator[BuildRow | BadRow]:
    """COCO captions (`captions_*.json`): an image and one of its captions, with `image_id` and `id` in json.

    Args:
        source: the captions file, or a folder with exactly one below it. images: their folder; None: looked for around
            the file by the name of the first image. captions: `all` writes an image once per caption: first every image
            with its first caption, then every image with its second, so that equal images are far apart; `first`.

    Raises:
        DataError: the file is not there or not of this form.
    """
    file = annotation_file(source, "captions_*.json")
    names = {image["id"]: str(image["file_name"]) for _, image in _objects(file, "images", ("id", "file_name"))}
    by_image: dict[int, list[tuple[int, str]]] = {}
    for origin, note in _objects(file, "annotations", ("image_id", "id", "caption")):
        if note["image_id"] not in names:
            yield BadRow(origin, f"image_id {shown(note['image_id'])} is not among the images of {file.name}")
        elif not isinstance(note["caption"], str):
            yield BadRow(origin, f"caption: expected text, got {shown(note['caption'])}")
        else:
            by_image.setdefault(note["image_id"], []).append((note["id"], note["caption"].strip()))
    root = images or _image_folder(file, names)
    rounds = max(map(len, by_image.values()), default=0) if captions == "all" else 1
    number = 0
    for nth in range(rounds):
        for image_id in by_image:
            if nth >= len(by_image[image_id]):
                continue
            note_id, caption = by_image[image_id][nth]
            origin = f"{file}, annotation {note_id}"
            try:
                ext, content = media_member(names[image_id], "image", root, fields)
                facts = json_bytes({"image_id": image_id, "id": note_id})
                members = {ext: content, fields.text[0]: text_bytes(caption), fields.meta[0]: facts}
                yield BuildRow(f"{number:09d}", members, origin)
            except BadSample as error:
                yield BadRow(origin, str(error))
            number += 1


def rows_from_vqa(
    source: Path, annotations: Path | None, images: Path | None, questions: str, instruction: str, fields: FieldsConfig
) -> Iterator[BuildRow | BadRow]:
    """VQA v2: a chat per image with all its questions, or one per question, answered by the most common answer.

    json also holds `image_id` and, per question, `question_id` and all `answers`, for evaluation.

    Args:
        source: the questions file, or a folder with exactly one below it. annotations: the answers; None: the file of
            that name beside it. images: their folder, found by the number at the end of the stem
            (`COCO_val2014_000000262148.jpg`); None: looked for around the file. questions: `together` or `single`.
        instruction: added to the first question of each chat; empty: nothing.

    Raises:
        DataError: a file is not there or not of this form.
    """
    file = annotation_file(source, "*questions*.json")
    answers_file = annotations or _answers_file(file)
    answers: dict[int, tuple[str, list[str]]] = {}
    for _, note in _objects(answers_file, "annotations", ("question_id", "multiple_choice_answer")):
        given = note.get("answers") or []
        answers[note["question_id"]] = (
            str(note["multiple_choice_answer"]),
            [str(answer.get("answer")) for answer in given if isinstance(answer, Mapping)],
        )
    by_chat: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for origin, note in _objects(file, "questions", ("image_id", "question_id", "question")):
        if note["question_id"] not in answers:
            yield BadRow(origin, f"question_id {shown(note['question_id'])} has no answer in {answers_file.name}")
            continue
        chat = (note["image_id"],) if questions == "together" else (note["image_id"], note["question_id"])
        by_chat.setdefault(chat, []).append({**note, "origin": origin})
    paths = _images_by_number(images or _around(file))
    for number, ((image_id, *_), asked) in enumerate(by_chat.items()):
        origin = asked[0]["origin"]
        try:
            if image_id not in paths:
                raise BadSample(f"no image with number {image_id} around {file}; name their folder: --media")
            media = media_member(str(paths[image_id]), "image", Path(), fields)
            members = _vqa_chat(image_id, asked, answers, media, instruction, fields)
            yield BuildRow(f"{number:09d}", members, origin)
        except BadSample as error:
            yield BadRow(origin, str(error))


def annotation_file(source: Path, pattern: str) -> Path:
    """The annotation file itself, or the only one below a folder."""
    if not source.is_dir():
        if not source.is_file():
            raise DataError(f"no file {source}; expected {pattern}, or a folder that holds it")
        return source
    found = sorted(source.rglob(pattern))
    if len(found) != 1:
        named = ", ".join(map(str, found[:4])) or "none"
        raise ConfigError(f"expected one {pattern} in {source}, found {named}; name the file itself")
    return found[0]


def _objects(file: Path, name: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of list `name` in a JSON file; each must have the keys."""
    expected = f"expected one JSON object with a list {name!r} of objects with {', '.join(keys)}"
    number = 0
    for number, value in enumerate(_elements(file, name, expected), start=1):
        missing = [key for key in keys if isinstance(value, BadRow) or key not in value]
        if isinstance(value, BadRow) or missing:
            raise DataError(f"{file}, {name} {number}: expected an object with {', '.join(keys)}; lacking {missing}")
        unusable = [key for key in keys if key.endswith("id") and not isinstance(value[key], (int, str))]
        if unusable:
            raise DataError(
                f"{file}, {name} {number}: {unusable[0]} must be a number or text, got {shown(value[unusable[0]])}"
            )
        yield f"{file}, {name} {number}", value
    if not number:
        raise DataError(f"{file} has no list {name!r}; is it the right file? {expected.capitalize()}")


def _elements(file: Path, name: str, expected: str) -> Iterator[dict[str, Any] | BadRow]:
    try:
        for _, value in json_elements(file, f"{name}.item"):
            yield value
    except DataError as error:
        lines = "; JSON lines are read by --from table, or llava" if file.name.endswith((".jsonl", ".jsonl.gz")) else ""
        raise DataError(f"{expected}, as COCO and VQA v2 are published{lines}; got: {error}") from error


def _vqa_chat(
    image_id: int,
    asked: list[dict[str, Any]],
    answers: Mapping[int, tuple[str, list[str]]],
    media: tuple[str, Any],
    instruction: str,
    fields: FieldsConfig,
) -> dict[str, Any]:
    chat = ChatMembers([media])
    turns = []
    for place, note in enumerate(asked):
        hint = f"\n{instruction}" if instruction and place == 0 else ""
        turns.append({"role": "user", "content": f"{note['question']}{hint}"})
        turns.append({"role": "assistant", "content": answers[note["question_id"]][0]})
    facts = {
        "messages": chat_messages(turns, chat),
        "image_id": image_id,
        "questions": [
            {"question_id": note["question_id"], "answers": answers[note["question_id"]][1]} for note in asked
        ],
    }
    return {**chat.members, fields.meta[0]: json_bytes(facts)}


def _answers_file(questions: Path) -> Path:
    """`v2_mscoco_val2014_annotations.json` for `v2_OpenEnded_mscoco_val2014_questions.json`."""
    name = questions.name.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace("questions", "annotations")
    around = [
        questions.with_name(name),
        *sorted(questions.parent.rglob(name)),
        *sorted(questions.parent.parent.rglob(name)),
    ]
    found = next((file for file in around if file.is_file()), None)
    if found is None:
        raise DataError(
            f"no answers for {questions}: expected {questions.with_name(name)}; name them: --annotations FILE"
        )
    return found


def _around(file: Path) -> Path:
    """The dataset's folder: annotations usually lie in one of their own beside the images."""
    return (
        file.parent.parent
        if file.parent.name in ("annotations", "questions", "Questions", "Annotations")
        else file.parent
    )


def _image_folder(file: Path, names: Mapping[int, str]) -> Path:
    first = next(iter(names.values()))
    root = _around(file)
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        for inner in (folder, folder / "images"):
            if (inner / first).is_file():
                return inner
    raise DataError(f"no image {first} in {root} or a folder of it; name the folder of the images: --media")


def _images_by_number(root: Path) -> dict[int, Path]:
    if not root.is_dir():
        raise DataError(f"no folder {root}; name the folder of the images: --media")
    found: dict[int, Path] = {}
    for path in sorted(root.rglob("*")):
        match = _IMAGE_NUMBER.search(path.stem)
        if match and path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            if int(match[1]) in found:
                raise ConfigError(
                    f"{path} and {found[int(match[1])]} have one number; name the images' folder: --media"
                )
            found[int(match[1])] = path
    return found
