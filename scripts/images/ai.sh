# shellcheck shell=bash disable=SC2154 # scripts/image reads this and has the variables.
# PyTorch for processors without CUDA, as Debian packages it: the wheel on PyPI needs 3 GB of NVIDIA's libraries to be
# imported at all. With it what images of that kind carry: transformers, scipy, scikit-learn, pyarrow.
recipe_layers() {
    step "layer 2: python3 and torch from Debian"
    apt_layer torch python3 python3-torch
    step "layer 3: packages from PyPI"
    begin_layer packages
    pip_install transformers==4.40.2 tokenizers==0.19.1 safetensors==0.5.3 huggingface-hub==0.25.2 filelock==3.18.0 fsspec==2025.5.1 \
        packaging==25.0 regex==2024.11.6 tqdm==4.67.1 scipy==1.11.4 scikit-learn==1.6.1 joblib==1.5.1 threadpoolctl==3.6.0 pyarrow==16.1.0 \
        pandas==2.0.3 python-dateutil==2.9.0.post0 pytz==2025.2 tzdata==2025.2
    end_layer
    made_by packages "pip install transformers"
    step "layer 4: the application"
    begin_layer app
    mkdir -p "$merged/app"
    cat >"$merged/app/main.py" <<'PY'
"""A small model: what it imports and runs is what a start has to read."""
import torch
from transformers import BertConfig, BertModel

model = BertModel(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=1000)).eval()
with torch.no_grad():
    out = model(torch.arange(16).reshape(1, 16)).last_hidden_state
print(f"ready torch {torch.__version__} shape {tuple(out.shape)}", flush=True)
PY
    settle_times
    end_layer
    made_by app "copy the application"
}
recipe_config() {
    jq -cn '{User: "nobody", Env: ["PATH=/usr/local/bin:/usr/bin:/bin", "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1", "HOME=/tmp", "HF_HUB_OFFLINE=1"],
             Entrypoint: ["python3", "/app/main.py"], WorkingDir: "/", Labels: {"example.ready": "ready torch"}}'
}
