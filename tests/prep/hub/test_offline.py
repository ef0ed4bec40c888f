"""Without the Hub: what its cache holds is read there, and local files need nothing of it."""

import subprocess
import sys
from pathlib import Path

from tests.prep.builds import ROOT, TOKENIZER, bytes_of, one_line_error, tokenize_arguments
from tests.prep.hub_builds import ON_MAIN, SMALL, data, environment, hub_tokenize
from tests.prep.hub_server import Hub


def test_offline_reads_what_is_cached_and_says_what_is_not(tmp_path: Path, hub: Hub, whole: dict[str, bytes]) -> None:
    offline = environment(hub, tmp_path, HF_HUB_OFFLINE="1")
    line = one_line_error(hub_tokenize(hub, tmp_path / "out", env=offline), 1)
    assert "HF_HUB_OFFLINE" in line and "tokenizer.model" in line
    code = """if True:
        from huggingface_hub import hf_hub_download, snapshot_download
        hf_hub_download("O/tokenizer", "tokenizer.model")
        snapshot_download("HuggingFaceFW/fineweb-edu", repo_type="dataset", revision="main",
                          allow_patterns=["README.md", "sample/10BT/001*"])
    """
    subprocess.run([sys.executable, "-c", code], env=environment(hub, tmp_path), check=True, capture_output=True)
    line = one_line_error(hub_tokenize(hub, tmp_path / "out", env=offline), 1)
    assert "2 of its 3 files, the first of them sample/10BT/000_00000.parquet: not in the Hub's cache" in line
    assert "HF_HUB_OFFLINE is set; unset it, or read local files: --source FOLDER" in line
    code = code.replace("001*", "*")
    subprocess.run([sys.executable, "-c", code], env=environment(hub, tmp_path), check=True, capture_output=True)
    hub.requests.clear()
    done = hub_tokenize(hub, tmp_path / "out", "--restart", env=offline, source=ON_MAIN)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == whole and hub.requests == []
    online = hub_tokenize(hub, tmp_path / "again")
    assert online.returncode == 0 and bytes_of(tmp_path / "again") == whole
    assert not any(data(request) for request in hub.requests), "cached files are read where they are"


def test_local_parquet_needs_neither_datasets_nor_zstandard_nor_the_hub(tmp_path: Path, files: Path) -> None:
    arguments = tokenize_arguments(files, tmp_path / "out", **{**SMALL, "tokenizer": TOKENIZER})
    code = """if True:
        import sys
        for name in ("datasets", "zstandard", "huggingface_hub"):
            sys.modules[name] = None
        from prep.cli import main
        from shared.stop import run_cli
        run_cli(main, "prep")
    """
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
