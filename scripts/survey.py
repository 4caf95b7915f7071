"""Find timm's architectures that can be reprogrammed completely: build and run each one, and write their names.

    python scripts/survey.py            # rewrites timm_nrpm/assets/architectures.json; about half an hour on one core

Models are built and run on the meta device, which computes shapes alone; where that fails, on the CPU.
"""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path

import timm
import torch
from rich.progress import track

import timm_nrpm
from timm_nrpm.models.reprogramming import record_of

TARGET = Path(timm_nrpm.__file__).parent / "assets" / "architectures.json"


def skipped_layers(name: str) -> dict[str, str]:
    """Return the layers that `reprogram_` leaves plain and why, or one entry that says why the model cannot be run."""
    failures = []
    for device in ("meta", "cpu"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with torch.device(device):
                    model = timm_nrpm.reprogram_(timm.create_model(name).eval())
            except Exception as error:
                failures.append(f"{device}: {type(error).__name__}: {error}")
                continue
        unseen = [str(w.message) for w in caught if "does not run on" in str(w.message)]
        if not unseen:
            return record_of(model).skipped
        failures.append(f"{device}: {unseen[0]}")
    return {"": " | ".join(failures)[:300]}


def main() -> None:
    torch.set_grad_enabled(False)
    complete, partial = [], {}
    for name in track(timm.list_models(exclude_filters="nrpm_*"), "Surveying"):
        skipped = skipped_layers(name)
        gc.collect()
        if skipped:
            partial[name] = f"{len(skipped)} layers stay plain, like {next(iter(skipped.items()))}"
        else:
            complete.append(name)
    TARGET.write_text(json.dumps({"timm": timm.__version__, "complete": complete, "partial": partial}, indent=0) + "\n")
    print(f"{len(complete)} architectures can be reprogrammed completely, {len(partial)} in part: {TARGET.name}")


if __name__ == "__main__":
    main()
