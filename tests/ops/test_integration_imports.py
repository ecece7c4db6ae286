"""The drop-ins import without the packages that they stand in for, and do not import them where they are."""

import subprocess
import sys

PEERS = ("trl", "verl", "liger_kernel", "transformers", "peft", "deepspeed")
MODULES = ("head", "liger", "torch_loss", "trl", "verl")


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_imports_a_peer():
    imports = "; ".join(f"import fastreason_kernels.integrations.{name}" for name in MODULES)
    absent = f"import sys; sys.modules.update(dict.fromkeys({PEERS}))"
    patch = "from fastreason_kernels.integrations.trl import patch_trl\ntry: patch_trl()\nexcept ImportError: print('refused')"
    assert python(f"{absent}; {imports}\n{patch}") == "refused\n"
    loaded = python(f"{imports}; import sys; print([name for name in {PEERS} if name in sys.modules])")
    assert loaded == "[]\n"
