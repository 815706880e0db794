"""Files that hold no rows, called by their names, with the command that makes rows of them where there is one.

No command writes to a file that exists, and all paths in commands are quoted for the shell.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_MAGIC = (
    (b"%PDF", "a PDF"),
    (b"SQLite format 3", "a SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\xd0\xcf\x11\xe0", "an old Office file (.xls, .doc)"),
    (b"ORC", "an ORC file"),
    (b"Obj\x01", "an Avro file"),
    (b"PARE", "an encrypted Parquet file"),
    (b"FEA1", "a Feather file of version 1"),
    (b"GGUF", "a model in GGUF"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
)
_WHATSAPP = r"^\W?\[?\d+[./-]\d+[./-]\d+,? \d+[:.]\d+[^]\n]{0,12}?(?:\]| -) "
"""How a message begins in an exported chat of WhatsApp, on Android and on an iPhone."""
_NEEDED = "rows are read from JSONL, JSON, CSV, TSV, Parquet and Arrow; fix: save or export the rows as one of these"


def refusal(head: bytes, path: Path) -> str | None:
    """What the file is, if it is known to be no rows, and the fix."""
    file = shell_path(path)
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 100_000_000:
        return f"weights of a model (safetensors); {_NEEDED}"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if head.startswith(b"PK\x03\x04"):
        if b"[Content_Types].xml" in head[:4096] or path.suffix.lower() in (".xlsx", ".docx", ".ods"):
            return "an Office file (.xlsx, .docx), not rows; fix: save the sheet as CSV UTF-8 and name that file"
        if b"/data.pkl" in head[:4096]:
            return f"a checkpoint of PyTorch; {_NEEDED}"
        folder = shell_path(new_path(path, ".files"))
        return f"a zip archive; fix: python -m zipfile -e {file} {folder}, and name that folder"
    if head[257:262] == b"ustar":
        folder = shell_path(new_path(path, ".files"))
        return f"a tar archive; fix: mkdir {folder} && tar -xf {file} -C {folder}, and name that folder"
    if re.match(_WHATSAPP, head.removeprefix(b"\xef\xbb\xbf")[:200].decode("utf-8", errors="replace")):
        return _of_whatsapp(path)
    if start.startswith(b"version https://git-lfs"):
        target = shell_path(new_path(path, ".lfs"))
        return (
            "a Git LFS pointer, which names the file that Git did not fetch; fix: "
            f"git lfs smudge < {file} > {target}, and name that file"
        )
    if re.match(rb"<!doctype html|<html|<head", start):
        return (
            "an HTML page, not the file: a login or a preview was saved; fix: download it anew from the address of the "
            "file itself (on huggingface.co /resolve/ in place of /blob/, on github.com /raw/)"
        )
    if start.startswith(b"<?xml"):
        return f"an XML file; {_NEEDED}"
    if head and not head.strip(b"\0"):
        return "only zero bytes: a copy or download that did not end; fix: fetch the file anew"
    encoding = _wide_encoding(head)
    if encoding is not None:
        target = shell_path(new_path(path, f".utf8{path.suffix}"))
        command = f"iconv -f {encoding} -t UTF-8 {file} > {target}"
        return f"{encoding} text, not UTF-8; fix: {command}, and name that file"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a Python pickle, which is never loaded: it can run any code; {_NEEDED}"
    # Text may begin with ORC too, but none of these formats is without zero bytes, except a PDF.
    is_text = b"\0" not in head and not head.startswith(b"%PDF")
    name = None if is_text else next((name for magic, name in _MAGIC if head.startswith(magic)), None)
    return None if name is None else f"{name}; {_NEEDED}"


def _of_whatsapp(path: Path) -> str:
    """Notes without a sender are messages of nobody, so that the command after it counts them."""
    load = (
        "import json, re, sys; t = sys.stdin.buffer.read().decode('utf-8-sig'); "
        f"p = [m.partition(': ') for m in re.split(r'(?m){_WHATSAPP}', t)[1:]]; "
        "print(json.dumps({'messages': [{'from': a if s else '', 'from_id': a, 'text': (b or a).strip()} "
        "for a, s, b in p]}))"
    )
    chat = shell_path(new_path(path, ".chat.jsonl"))
    return (
        f'an exported chat of WhatsApp, not rows; fix: python -c "{load}" < {shell_path(path)} > {chat}, and then '
        f"lora-core convert {chat} --output NEW.jsonl --kind chat-log --reply-of NAME"
    )


def of_printed_objects(path: Path) -> str:
    """What objects are that Python printed, one a line, and the command that writes them as JSONL."""
    each = "print(json.dumps(ast.literal_eval(row.decode())))"
    load = f"import ast, json, sys; [{each} for row in sys.stdin.buffer if row.strip()]"
    target = shell_path(new_path(path, ".rows.jsonl"))
    command = f'python -c "{load}" < {shell_path(path)} > {target}'
    return f"objects as Python prints them, not JSON; fix: {command}, and name that file"


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character that was cut off
    return True


def of_text(head: bytes, path: Path) -> str:
    """Why a text without a JSON object in its first lines holds no rows, and the fix."""
    file, target = shell_path(path), shell_path(new_path(path, ".rows.jsonl"))
    if b"\0" in head or not _is_utf8(head):
        return f"a binary file that is not known; {_NEEDED}"
    if path.suffix.lower() in (".yaml", ".yml"):
        load = "import json, sys, yaml; [print(json.dumps(row)) for row in yaml.safe_load(sys.stdin.buffer)]"
        return f'YAML, not rows; fix: python -c "{load}" < {file} > {target}, and name that file'
    whole = "import json, sys; print(json.dumps({'text': sys.stdin.buffer.read().decode()}))"
    return (
        f'plain text, not rows; {_NEEDED}, or train it as one text: python -c "{whole}" < {file} > {target}, and name '
        "that file"
    )


def _wide_encoding(head: bytes) -> str | None:
    for mark, name in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32")):
        if head.startswith(mark):
            return name
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    # Without a mark: every second byte of ASCII text is zero.
    if len(head) >= 4 and (head[1:8:2].strip(b"\0") == b"" or head[0:8:2].strip(b"\0") == b""):
        return "UTF-16LE" if head[0] else "UTF-16BE"
    return None


def new_path(path: Path, ending: str) -> Path:
    """A name beside the file that nothing has yet."""
    base = path.name.split(".")[0] or "rows"
    number = 1
    while (new := path.with_name(f"{base}{'' if number == 1 else f'-{number}'}{ending}")).exists():
        number += 1
    return new


def shell_path(path: Path) -> str:
    # A name such as -rf is a path, and no option.
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
