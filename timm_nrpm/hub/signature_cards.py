"""Cards of weight signatures, which claim nothing of what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from timm_nrpm.hub.cards import TAGS, forget_what_is_of_another_base
from timm_nrpm.hub.templates import CARD, Metadata, kept_of, tagged, written
from timm_nrpm.models.signatures import TENSORS, Signature


def write_signature_card(
    folder: Path,
    name: str,
    existing: str | None = None,
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> Path:
    """Write the card of the signature in a folder.

    Args:
        folder: Folder that holds a signature.
        name: Name of the repository on the Hub, `owner/name`.
        existing: Text of the existing card, whose handwritten parts and other metadata stay.
        license: Identifier of a licence that the Hub knows, which has to be given.
        datasets: Names on the Hub of the datasets that the two models were trained on.
        tags: Further tags, beside those in the existing card and those of this package.

    Returns:
        Path of the card.

    Raises:
        ValueError: No licence is given, or the existing card cannot be read.
    """
    validate_repo_id(name)
    signature, kept = Signature.load(folder), kept_of(existing, name)
    data: Metadata = {**kept.metadata, "library_name": "timm_nrpm", "pipeline_tag": "image-classification"}
    if license is None:
        raise ValueError(
            "A signature is made of the weights of two models, and no licence of it is known: give one as license=, an "
            "identifier that the Hub knows, such as 'mit'."
        )
    forget_what_is_of_another_base(data, kept, license)
    data["license"] = license
    data["tags"] = tagged((*TAGS, "weight-signature"), tags, kept)
    data |= {"datasets": list(datasets)} if datasets else {}
    content: Metadata = {
        "name": name,
        "architecture": signature.architecture,
        "layers": signature.layers,
        "size": (folder / TENSORS).stat().st_size,
        "natural": signature.natural[:16],
        "robust": signature.robust[:16],
        "start": signature.start and signature.start[:16],
    }
    (folder / CARD).write_text(str(written("signature.md", data, kept, content)), encoding="utf-8")
    return folder / CARD
