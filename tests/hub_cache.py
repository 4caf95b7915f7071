"""What downloads leave on a machine."""

from safetensors.torch import save_file


def hub_cache(root, repo, files, commit="0123456789abcdef0123456789abcdef01234567"):
    """A Hub cache as huggingface_hub lays it out: what one download leaves behind."""
    store = root / f"models--{repo.replace('/', '--')}"
    snapshot = store / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    for name, content in files.items():
        if isinstance(content, dict):
            save_file(content, snapshot / name)
        elif isinstance(content, bytes):
            (snapshot / name).write_bytes(content)
        else:
            (snapshot / name).write_text(content)
    return commit
