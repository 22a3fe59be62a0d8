"""Read recipes from the Hugging Face hub and write them to it: ``recipe.json`` and a card about it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.text import visible

if TYPE_CHECKING:
    from bnpatch.core.recipe import Recipe

#: How a recipe on the hub is named, in timm's spelling: ``hf-hub:org/name``, or ``hf-hub:org/name@revision``.
PREFIX = "hf-hub:"

FILE = "recipe.json"


def fetch(name: str) -> Path:
    """Download the recipe of a repository, once, and return its path.

    Args:
        name: the repository, org/name or org/name@revision.

    Raises:
        BnpatchError: there is no such repository, it has no recipe, or the hub can't be reached.
    """
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repository, FILE, revision=revision or None))
    except Exception as error:  # the hub's client raises errors of many types
        raise BnpatchError(
            f"cannot read {FILE} of {PREFIX}{name}: {first_line(error)}",
            "check the name and the connection, or download the file and name it",
        ) from error


def push(recipe: "Recipe", repository: str, *, private: bool, token: str | None, card: str) -> str:
    """Write a recipe and its card to a repository, in one commit, and return the address of the commit.

    Raises:
        BnpatchError: the hub refuses it or can't be reached.
    """
    import json

    from huggingface_hub import CommitOperationAdd, HfApi

    files = {FILE: json.dumps(recipe.to_json(), indent=2) + "\n", "README.md": card}
    try:
        hub = HfApi(token=token)
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.create_commit(
            repository,
            [CommitOperationAdd(name, text.encode()) for name, text in files.items()],
            commit_message="Recipe of bnpatch",
        )
    except Exception as error:  # the hub's client raises errors of many types
        raise BnpatchError(
            f"cannot write to {PREFIX}{repository}: {first_line(error)}",
            "check the name and the connection, and that you are logged in (hf auth login) and may write",
        ) from error
    return str(commit.commit_url)


def card(
    recipe: "Recipe", repository: str, license_: str | None = None, base_model: str | None = None
) -> str:
    """Describe a recipe in Markdown: what was tuned, on what, what unseen examples say, how to apply it."""
    about = recipe.provenance
    head = {
        "library_name": "bnpatch",
        "license": license_,
        "base_model": base_model,
        "tags": "[bnpatch, image-classification]",
    }
    data = about.get("data") or {}
    patched = sum(alpha > 0 for alpha in recipe.alphas.values())
    recommended = about.get("recommended")
    lines = (
        "---",
        *(f"{key}: {value}" for key, value in head.items() if value),
        "---",
        f"# {repository}",
        "",
        "A recipe of bnpatch: weights for the norm layers of a trained model, found without retraining. "
        "It holds none of the model's own parameters.",
        "",
        f"- Model: {about.get('architecture') or about.get('model') or 'unknown'}",
        f"- Norm layers that weight the example: {patched} of {len(recipe.norm_layers)}",
        f"- Tuned for {about.get('metric', 'unknown')} on {data.get('name', 'unknown')}, "
        f"{data.get('tuning_examples', '?')} examples; seed {about.get('seed', '?')}",
        f"- Verdict: {about.get('verdict', 'none')}"
        + ("" if recommended is not False else " (not recommended)"),
        "",
        *_held_out(about.get("held_out") or {}, data.get("held_out_examples", "?")),
        "```python",
        "import bnpatch",
        "",
        f'model = bnpatch.apply(model, "{PREFIX}{repository}")  # the module that it was tuned on, in place',
        "```",
    )
    return "\n".join(visible(line, keep="\n") for line in lines) + "\n"


def _held_out(metrics: dict[str, Any], count: Any) -> Iterator[str]:
    """Yield a table of the metrics on examples that the search did not see."""
    rows = {
        name: values for name, values in metrics.items() if isinstance(values, dict) and "change" in values
    }
    if not rows:
        return
    yield f"On {count} examples that the search did not see, with 95% intervals of the change:"
    yield ""
    yield "| metric | before | after | change |"
    yield "| --- | --- | --- | --- |"
    for name, values in rows.items():
        before, after, change = (values[key] for key in ("before", "after", "change"))
        yield (
            f"| {name} | {before['value']:.4f} | {after['value']:.4f} | "
            f"{change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}] |"
        )
    yield ""
