"""Ollama's Modelfile: the weights, the chat format as a Go template, and where replies end.

Ollama does not run the Jinja template in a GGUF file. The formats below are told by what the tokenizer's own template
writes for a short chat, so that a template is only named where it writes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_core.encoding.template import render_chat
from lora_core.errors import ChatTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Format:
    """A chat format: what stands around each turn."""

    start: str
    """Before a turn's text; `ROLE` is its role."""
    end: str

    def text(self, turns: list[tuple[str, str]]) -> str:
        """The turns, and the start of a reply."""
        written = "".join(self.start.replace("ROLE", role) + text + self.end for role, text in turns)
        return written + self.start.replace("ROLE", "assistant")

    @property
    def go_template(self) -> str:
        """For Ollama: `.System` is among `.Messages` there."""
        start = self.start.replace("ROLE", "{{ .Role }}")
        reply = self.start.replace("ROLE", "assistant")
        return f"{{{{ range .Messages }}}}{start}{{{{ .Content }}}}{self.end}{{{{ end }}}}{reply}"


FORMATS = {
    "ChatML": Format("<|im_start|>ROLE\n", "<|im_end|>\n"),
    "Llama 3": Format("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>"),
    "Zephyr": Format("<|ROLE|>\n", "</s>\n"),
    "Phi-3": Format("<|ROLE|>\n", "<|end|>\n"),
}
_CHAT = [("system", "Be brief."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?")]


def modelfile(tokenizer: PreTrainedTokenizerBase, source: str, stops: list[str], adapter: str | None = None) -> str:
    """The text of a Modelfile.

    Args:
        source: a GGUF file, or the name of a model that Ollama has.
        stops: the tokens at which replies end.
        adapter: a GGUF file with an adapter for `source`.
    """
    lines = [f"FROM {source}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    found = find_format(tokenizer)
    if found is None:
        lines += [
            "# The chat template is none of those that are known here as Go templates, and Ollama runs no Jinja: it",
            "# takes the nearest of its own, or none. Compare a reply with lora-core chat, or write a TEMPLATE.",
        ]
    else:
        shape, system = found
        lines.append(f'TEMPLATE """{shape.go_template}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
    quoted = [stop.replace("\\", "\\\\").replace('"', '\\"') for stop in stops]
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in quoted), ""])


def find_format(tokenizer: PreTrainedTokenizerBase) -> tuple[Format, str | None] | None:
    """The format that writes what the tokenizer's template does, and the system text that it adds by itself; None if
    there is none."""
    if tokenizer.chat_template is None:
        return None
    try:
        whole, without_system = (_rendered(tokenizer, turns) for turns in (_CHAT, _CHAT[1:]))
    except ChatTemplateError:
        return None
    # Ollama writes the token that begins a text by itself.
    for begin in ("", str(tokenizer.bos_token or "")):
        for shape in FORMATS.values():
            if begin + shape.text(_CHAT) != whole:
                continue
            plain, start = shape.text(_CHAT[1:]), begin + shape.start.replace("ROLE", "system")
            if without_system == begin + plain:
                return shape, None
            if without_system.startswith(start) and without_system.endswith(shape.end + plain):
                return shape, without_system[len(start) : -len(shape.end + plain)]
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    return render_chat(tokenizer, messages, add_generation_prompt=True)
