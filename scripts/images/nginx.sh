# shellcheck shell=bash disable=SC2154 # scripts/image reads this and has the variables.
# A server that says nothing: it is ready when it answers on port 8080.
recipe_layers() {
    step "layer 2: nginx from Debian"
    apt_layer nginx nginx-light
    step "layer 3: its configuration"
    begin_layer conf
    cat >"$merged/etc/nginx/firstread.conf" <<'CONF'
daemon off;
worker_processes 1;
pid /tmp/nginx.pid;
error_log stderr;
events {}
http {
    include /etc/nginx/mime.types;
    access_log off;
    client_body_temp_path /tmp/body;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;
    server { listen 8080; root /var/www/html; }
}
CONF
    settle_times
    end_layer
    made_by conf "copy the configuration"
}
recipe_config() {
    jq -cn '{User: "nobody", Env: ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], Entrypoint: ["nginx", "-c", "/etc/nginx/firstread.conf"],
             WorkingDir: "/", ExposedPorts: {"8080/tcp": {}}, Labels: {"example.ready": "8080"}}'
}
