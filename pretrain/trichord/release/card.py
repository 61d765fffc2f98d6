"""The model card of an export: what it is and how to load it, from the config alone. It claims no quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trichord.fusion.hf_config import TrichordConfig

_LOAD_TRUNK = """```python
import torch
import trichord.fusion.hf  # registers the model type
from transformers import AutoModelForImageTextToText, AutoTokenizer

model = AutoModelForImageTextToText.from_pretrained("PATH").eval()
tokenizer = AutoTokenizer.from_pretrained("PATH")
image = torch.zeros(3, {size}, {size}, dtype=torch.uint8)  # your picture: RGB, resized to the model's size
inputs = model.prepare_prompts([image], [None])
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]))
```

`trunk/` holds the language model alone, for plain transformers: `AutoModelForCausalLM.from_pretrained("PATH/trunk")`.
"""

_LOAD_TOWERS = """```python
import trichord.fusion.hf  # registers the model type
from transformers import AutoModel

model = AutoModel.from_pretrained("PATH").eval()  # embed_images, embed_audio, embed_text
```
"""


def render_card(config: TrichordConfig, parameters: Mapping[str, int], facts: Mapping[str, Any]) -> str:
    """Markdown. parameters: how many by part of the model; facts: extra lines, such as run and step."""
    lines = ["---", "library_name: transformers", "tags: [trichord]", "---", "", "# A Trichord model", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- {part}: {_describe(part, config)}{count:,} parameters" for part, count in parameters.items()]
    lines += [f"- inputs: {', '.join(_inputs(config))} (see preprocessor_config.json)", "", "## Loading it", ""]
    size = config.samples["image"]["size"]
    lines += [_LOAD_TOWERS if config.text_config is None else _LOAD_TRUNK.format(size=size)]
    lines += ["To go on training from it: `run.init_from: PATH` in a Trichord run config.", ""]
    return "\n".join(lines)


def _describe(part: str, config: TrichordConfig) -> str:
    encoders = config.encoders
    names = {
        "vision": lambda: encoders["vision"]["name"],
        "audio": lambda: encoders["audio"]["kind"],
        "text": lambda: encoders["text"]["kind"],
        "trunk": lambda: config.text_config.model_type,
        "connectors": lambda: config.fusion["connector"],
    }
    return f"{names[part]()}, " if part in names else ""


def _inputs(config: TrichordConfig) -> list[str]:
    found = []
    if config.encoders["vision"]:
        size = config.samples["image"]["size"]
        found.append(f"images of {size} x {size} pixels")
    if config.encoders["audio"]:
        audio = config.samples["audio"]
        found.append(f"mono audio at {audio['sample_rate']} Hz of up to {audio['max_seconds']:g} s")
    return [*found, "text"]
