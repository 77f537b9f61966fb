"""Write an adapter with the peft that is installed, for tests/test_lora.py.

    python -m venv --system-site-packages old && old/bin/pip install --no-deps peft==0.7.1
    old/bin/python tests/adapters/write.py

The adapters beside this file were written so by peft 0.7.1 (the key form that held since), by
0.11.1 (which brought DoRA and rsLoRA into the config) and by 0.21.2, over transformers' random
PaliGemma of tests/random_models.py.
"""

import inspect
import sys
from pathlib import Path

import peft
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from random_models import reference_model  # noqa: E402

CASES = {
    "0.7.1": {"target_modules": ["q_proj", "v_proj"]},
    "0.11.1": {"target_modules": r".*(down_proj|o_proj|fc1)", "use_rslora": True},
    "0.21.2": {"target_modules": ["q_proj", "v_proj", "linear", "fc2"], "use_rslora": True},
}


def main():
    case = CASES[peft.__version__]
    known = inspect.signature(peft.LoraConfig).parameters
    assert set(case) <= set(known), "this peft knows no such option"
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, **case)
    model = peft.get_peft_model(reference_model(), config).eval()
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    folder = HERE / peft.__version__
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
