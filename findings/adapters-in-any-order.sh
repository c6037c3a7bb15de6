#!/usr/bin/env bash
# peft 0.21.2 (torch 2.15.0, transformers 5.23.0)
# Behaviour: an adapter that is saved by two processes has two different adapter_config.json. The layers are given as a list, peft
#   keeps them as a set of strings, and writes the set as it iterates, which Python shuffles anew in every process. The tensors
#   beside it are the same to the last byte.
# Why it matters: a checkpoint that is made again, or by another worker, is known again by the digests of its files. With peft's own
#   file every resumed fine-tuning looks like another one, and a copy that was verified once fails to verify against the next.
# Seen: ten processes wrote 8 different adapter_config.json, and one adapter_model.safetensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 torch==2.15.0 transformers==5.23.0 numpy==2.4.6
cat > "$folder/save.py" <<'PYTHON'
import hashlib
import pathlib
import sys

import peft
import torch
from torch import nn

torch.manual_seed(0)
layers = {"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)}
config = peft.LoraConfig(r=2, target_modules=list(layers), init_lora_weights=False)
folder = pathlib.Path(sys.argv[1])
peft.get_peft_model(nn.ModuleDict(layers), config).save_pretrained(folder)
for name in ("adapter_config.json", "adapter_model.safetensors"):
    print(name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
PYTHON
for seed in 0 1 2 3 4 5 6 7 8 9; do
    # What Python draws for each process, drawn here, so that the same is seen again.
    PYTHONHASHSEED=$seed "$folder/venv/bin/python" "$folder/save.py" "$folder/$seed" >> "$folder/seen" 2> /dev/null
done
settings=$(grep '^adapter_config.json' "$folder/seen" | sort -u | wc -l)
tensors=$(grep '^adapter_model.safetensors' "$folder/seen" | sort -u | wc -l)
echo "ten processes wrote $settings different adapter_config.json, and $tensors adapter_model.safetensors"
if [ "$settings" -gt 1 ] && [ "$tensors" -eq 1 ]; then echo "as described"; else echo "CHANGED"; exit 1; fi
