"""An adapter or a merged model, put on the Hugging Face hub with card and report.

`huggingface_hub` divides the work: small files go into the commit, large ones are uploaded before it, and what is there
already is not sent again. So an upload that broke off continues when the command is run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.checkpoints.card import bare_card, counts_of, hub_id, model_card
from lora_core.errors import ConfigError, LoraCoreError, counted
from lora_core.export.as_adapter import Adapter

REPORT = "report.html"


@dataclass(frozen=True)
class Files:
    """What is to be in the repository: its path there -> a file, or its content."""

    contents: dict[str, Path | bytes]

    @property
    def num_bytes(self) -> int:
        sizes = (each.stat().st_size if isinstance(each, Path) else len(each) for each in self.contents.values())
        return sum(sizes)


def adapter_files(source: Adapter, base_model: str | None, with_report: bool, say: Callable[[str], None]) -> Files:
    """The adapter's folder, its card written anew, and the run's report.

    Args:
        base_model: the hub id of the base model, in place of what the run says.

    Raises:
        ConfigError: `base_model` is no hub id.
    """
    base = checked_base(base_model) or hub_id(source.config.model.name_or_path)
    files: dict[str, Path | bytes] = dict(_plain_files(source.folder))
    peft = json.loads((source.folder / "adapter_config.json").read_text(encoding="utf-8"))
    if base is None:
        folder = Path(source.config.model.name_or_path)
        say(
            f"warning: the base model is a local folder ({folder}), which nobody else has, and the card names none; "
            "fix: --base-model OWNER/NAME"
        )
        peft["base_model_name_or_path"] = folder.name
    else:
        peft["base_model_name_or_path"] = base
    files["adapter_config.json"] = _text(json.dumps(peft, indent=2, ensure_ascii=False) + "\n")
    if source.has_config:
        # What was measured is of the adapter that the run ended with.
        measured = source.summary if source.run is not None and source.folder.parent == source.run else {}
        card = model_card(source.config, counts_of(source.summary), peft, measured, base)
        files["README.md"] = _text(card)
    elif "README.md" not in files:
        files["README.md"] = _text(bare_card(peft, base))
    if source.tokenizer_dir is None:  # a checkpoint has none
        files |= _tokenizer_files(source)
    return Files(files | (report_of(source.run, say) if with_report else {}))


def model_files(folder: Path) -> Files:
    """A folder with a whole model, such as `merge` writes."""
    return Files(dict(_plain_files(folder)))


def report_of(run: Path | None, say: Callable[[str], None]) -> dict[str, Path | bytes]:
    """The run's page, if there is a run and it has one."""
    if run is None or not (run / REPORT).is_file():
        say("no report.html: there is no run, or it has none")
        return {}
    say("report.html goes along: it shows some rows and sample replies; --no-report leaves it out")
    return {REPORT: run / REPORT}


def checked_base(name: str | None) -> str | None:
    """
    Raises:
        ConfigError: it is no hub id.
    """
    if name is not None and hub_id(name) is None:
        raise ConfigError(f"--base-model {name}: is no hub id; fix: OWNER/NAME, as in Qwen/Qwen2.5-0.5B-Instruct")
    return name


def push(files: Files, repo: str, public: bool, message: str, say: Callable[[str], None] = print) -> str:
    """Make the repository if there is none, and commit the files to it; returns the commit's address.

    Raises:
        ConfigError: the name, the token or the card is refused, or the repository is public and may not be.
        LoraCoreError: the hub cannot be reached, or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for path, content in sorted(files.contents.items())
    ]
    with _as_sentences(repo):
        api = HfApi(library_name="lora_core")
        api.create_repo(repo, private=not public, exist_ok=True)
        is_private = bool(api.model_info(repo).private)
        if not is_private and not public:
            raise ConfigError(f"{repo}: is public; fix: --public, or the name of another repository")
        if is_private and public:
            say(f"{repo}: stays private, as it is; make it public in its settings on the hub")
        size, seen = f"{files.num_bytes / 2**20:.1f} MiB", "private" if is_private else "public"
        say(f"pushing {counted(len(operations), 'file')}, {size}, to {repo} ({seen}) ...")
        commit: Any = api.create_commit(repo, operations, commit_message=message)
    return str(commit.commit_url)


# ---------------------------------------------------------------------------------------------------------------


def _plain_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            yield path.name, path


def _tokenizer_files(source: Adapter) -> dict[str, Path | bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        source.load_tokenizer().save_pretrained(name)
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


def _text(text: str) -> bytes:
    from lora_core.untrusted.text import without_secrets

    return without_secrets(text).encode("utf-8", errors="backslashreplace")


@contextmanager
def _as_sentences(repo: str) -> Iterator[None]:
    """What huggingface_hub raises, as errors with a fix. Their texts may quote a request, but no token."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{repo}: is no name of a repository: {_first_line(error)}; fix: OWNER/NAME") from error
    except OfflineModeIsEnabled as error:
        raise ConfigError(
            f"{repo}: HF_HUB_OFFLINE is set, so nothing can be pushed; fix: unset HF_HUB_OFFLINE"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(repo, error) from error
    except (RuntimeError, _http_error()) as error:  # an upload says RuntimeError, and what happened is its cause
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(repo, cause) from error
        if not isinstance(cause, (_http_error(), OSError)):
            raise
        reason = _first_line(cause)
        raise LoraCoreError(
            f"{repo}: the hub cannot be reached: {reason}; fix: a connection, then the same command again (what is "
            "there is not sent again)",
            "hub_unreachable",
        ) from error
    except ValueError as error:  # huggingface_hub's own checks, such as of the card
        raise ConfigError(f"{repo}: {' '.join(str(error).split())[:400]}", "push_refused") from error


def _http_error() -> type[Exception]:
    """What huggingface_hub's HTTP client raises, whichever it is in this version of it."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _refusal(repo: str, error: Any) -> LoraCoreError:
    from huggingface_hub import get_token

    status = error.response.status_code if getattr(error, "response", None) is not None else None
    login = "`hf auth login` with a token that may write, or HF_TOKEN in the environment"
    if status == 401 and get_token() is None:
        return ConfigError(f"{repo}: there is no token for the hub; fix: {login}", "hub_token")
    if status in (401, 403):
        return ConfigError(f"{repo}: the hub does not let this token write there ({status}); fix: {login}", "hub_token")
    if status == 404:
        return ConfigError(
            f"{repo}: the hub knows no such owner or repository, or the token may not see it (404); fix: an owner that "
            f"you may write to, or {login}",
            "hub_not_found",
        )
    return LoraCoreError(
        f"{repo}: the hub answered {status}: {_first_line(error)}; fix: the same command again, later (what is there "
        "is not sent again)",
        "hub_failed",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
