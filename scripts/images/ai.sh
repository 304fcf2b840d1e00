# shellcheck shell=bash disable=SC2154 # scripts/image reads this and has the variables.
# PyTorch as `pip install torch` gives it on Linux: the build for CUDA with NVIDIA's libraries (1.8 GB of wheels), which a
# start without a GPU loads and does not use. With it what images of that kind carry: transformers, scipy, scikit-learn,
# pyarrow. 40 000 files of 4.2 GB, 2.05 GB in gzip. 1.13.1 is the last release that comes with cuBLAS and cuDNN alone; later
# ones are larger. The list is complete: pip is not asked for what its packages need.
recipe_layers() {
    # In megabytes: the layer, the tree and the layer's tar at the same time, and what is kept of it.
    local need=15000 free
    free=$(df --output=avail -BM "$cache" | tail -1 | tr -dc 0-9)
    if [ "$free" -lt "$need" ]; then
        echo "scripts/image: $cache has $free MB free, making 'ai' needs $need MB; set FIRSTREAD_CACHE to another place" >&2
        exit 1
    fi
    step "layer 2: python3 from Debian"
    apt_layer python python3
    step "layer 3: torch and packages from PyPI"
    begin_layer packages
    # The wheels' own directory is beside the cache: /tmp may be memory.
    TMPDIR=$build pip_install torch==1.13.1 nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96 nvidia-cuda-nvrtc-cu11==11.7.99 \
        nvidia-cuda-runtime-cu11==11.7.99 setuptools==75.8.0 wheel==0.45.1 typing-extensions==4.13.2 numpy==1.26.4 \
        transformers==4.40.2 tokenizers==0.19.1 safetensors==0.5.3 huggingface-hub==0.25.2 filelock==3.18.0 fsspec==2025.5.1 \
        packaging==25.0 pyyaml==6.0.2 regex==2024.11.6 requests==2.32.3 urllib3==2.4.0 charset-normalizer==3.4.2 idna==3.10 certifi==2025.4.26 tqdm==4.67.1 \
        scipy==1.11.4 scikit-learn==1.6.1 joblib==1.5.1 threadpoolctl==3.6.0 pyarrow==16.1.0 \
        pandas==2.0.3 python-dateutil==2.9.0.post0 pytz==2025.2 tzdata==2025.2 six==1.17.0
    end_layer
    made_by packages "pip install torch transformers"
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
