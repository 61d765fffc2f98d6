"""`preflight --fetch`: everything the config names on the Hugging Face hub, into its cache on this machine.

Only weights in safetensors, JSON and the text of tokenizers: nothing that is pickled, no code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from trichord_launch.preflight.finding import Finding
from trichord_launch.preflight.models import Needs, Reference, local_folder, missing_files

_TEXT = ("*.json", "*.txt", "*.model")
PATTERNS: dict[Needs, tuple[str, ...]] = {
    "tokenizer": _TEXT,
    "model": ("*.safetensors", *_TEXT),
    "weights": ("*.safetensors",),
}
_TRUE = ("1", "on", "yes", "true")


def fetch(wanted: Sequence[Reference]) -> list[Finding]:
    """Download what is not here yet; one finding for each reference to the hub."""
    return [_fetch(reference) for reference in wanted if reference.is_hub]


def _fetch(reference: Reference) -> Finding:
    check, name = f"fetch {reference.key}", f"{reference.repo}@{reference.revision}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return Finding(
            check, "fail", "huggingface_hub is not installed here", "pip install 'trichord[hub]'", kind="config"
        )
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        return Finding(check, "fail", "HF_HUB_OFFLINE is set here", "fetch without it: HF_HUB_OFFLINE=0", "config")
    try:
        patterns = list(PATTERNS[reference.needs])
        snapshot_download(reference.repo, revision=reference.revision, allow_patterns=patterns)
    except Exception as error:  # of the hub, its client's many libraries, the network, the disk: told, not raised
        said = str(error).strip().splitlines()
        remedy = "check name and revision, `hf auth login` for a gated one, the way to the internet (HF_ENDPOINT)"
        return Finding(check, "fail", f"{name}: {type(error).__name__}: {said[0] if said else ''}", remedy, "config")
    place = local_folder(reference)
    if place is None or (missing := missing_files(reference, place)):
        lacks = f"it lacks {', '.join(missing)}" if place is not None else "it is not in the cache"
        remedy = "choose a repository with a fast tokenizer and weights in safetensors; pickled ones are never fetched"
        return Finding(check, "fail", f"{name} was fetched, but {lacks}", remedy, "config")
    return Finding(check, "pass", f"{name} is in the cache at commit {place.name[:12]}")
