# shellcheck shell=bash disable=SC2154 # scripts/image reads this and has the variables.
# A server of few libraries. It says "Ready to accept connections" and stays.
recipe_layers() {
    step "layer 2: redis from Debian"
    apt_layer redis redis-server
}
recipe_config() {
    jq -cn '{User: "nobody", Env: ["PATH=/usr/local/bin:/usr/bin:/bin"], Entrypoint: ["redis-server"], Cmd: ["--save", "", "--dir", "/tmp"],
             WorkingDir: "/", ExposedPorts: {"6379/tcp": {}}, Labels: {"example.ready": "Ready to accept connections"}}'
}
