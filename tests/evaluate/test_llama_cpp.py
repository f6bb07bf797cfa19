"""The files that llama.cpp is compared on hold the weights that we run, in llama.cpp's types."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from fastmtp.engines.torch.target import Target, load_target
from fastmtp.others import llama_cpp
from tests.models.test_target import write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "cache_directory", lambda: tmp_path / "cache")


@pytest.mark.parametrize(("kind", "tolerance"), [("BF16", 2**-8), ("Q8_0", 2**-7), ("Q4_0", 2**-3)])
def test_weights_in_another_type(tmp_path: Path, llama: Target, kind: str, tolerance: float) -> None:
    """Every matrix that blocks of 32 divide is of the type and near the original; the file is made once."""
    source = tmp_path / "model.gguf"
    write_gguf(source, llama)
    made = llama_cpp.requantized(source, kind)
    matrices = [tensor for tensor in gguf.GGUFReader(made).tensors if len(tensor.shape) > 1]
    assert {tensor.tensor_type.name for tensor in matrices if tensor.shape[0] % 32 == 0} == {kind}
    loaded, reference = (load_target(str(path), device="cpu") for path in (made, source))
    assert loaded.identity == reference.identity
    for name, value in loaded.model.state_dict().items():
        original = reference.model.state_dict()[name]
        assert (value - original).abs().max() <= tolerance * original.abs().max(), name
    before = made.stat().st_mtime_ns
    assert llama_cpp.requantized(source, kind) == made
    assert made.stat().st_mtime_ns == before


def test_the_file_itself(tmp_path: Path, llama: Target) -> None:
    """Nothing is made; the report has llama.cpp's name of its type, if the file says it."""
    source = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert llama_cpp.requantized(source, llama_cpp.FILE) == source
    assert llama_cpp.type_of(source, llama_cpp.FILE) == "the file itself (Q4_K_M)"
    write_gguf(source, llama)
    assert llama_cpp.type_of(source, llama_cpp.FILE) == "the file itself (unnamed type)"
    assert llama_cpp.type_of(source, "Q4_0") == "Q4_0"


def test_failure_says_why(tmp_path: Path) -> None:
    """A file that llama.cpp cannot read, or llama.cpp that is not there: one error with its last words."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"broken\.gguf: llama\.cpp failed: .+"):
        llama_cpp.decode_speed(path, [1, 2, 3], 4, 1)
