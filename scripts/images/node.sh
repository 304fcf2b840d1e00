# shellcheck shell=bash disable=SC2154 # scripts/image reads this and has the variables.
# A web application on node with the usual packages from npm. Its lock file is made anew for the packages' newest
# versions of the majors below.
recipe_layers() {
    step "layer 2: node from Debian"
    apt_layer node nodejs
    step "layer 3: packages from npm"
    local modules=$build/modules
    # npm is used in a layer that is thrown away again.
    begin_layer npm
    in_root sh -euc 'apt-get -qq -o Acquire::Retries=5 update; apt-get -qq -o Acquire::Retries=5 install -y --no-install-recommends npm'
    mkdir -p "$merged/app"
    jq -n '{name: "app", version: "1.0.0", private: true, dependencies: {
        express: "^4", fastify: "^4", lodash: "^4", axios: "^1", moment: "^2", "date-fns": "^3", rxjs: "^7", winston: "^3", pino: "^9",
        ajv: "^8", uuid: "^9", "body-parser": "^1", cors: "^2", helmet: "^7", jsonwebtoken: "^9", "js-yaml": "^4", commander: "^12",
        typescript: "^5", webpack: "^5", "@babel/core": "^7", graphql: "^16", mongoose: "^8", sequelize: "^6", "socket.io": "^4"}}' >"$merged/app/package.json"
    cp /etc/ssl/certs/ca-certificates.crt "$merged/tmp/ca.crt"
    in_root env NODE_EXTRA_CA_CERTS=/tmp/ca.crt npm_config_cafile=/tmp/ca.crt npm_config_cache=/tmp/npm \
        sh -euc 'cd /app; npm install --omit=dev --no-audit --no-fund --ignore-scripts'
    mv "$merged/app" "$modules"
    umount "$merged"
    rm -rf "$build/npm" "$build/overlay-work"
    begin_layer packages
    mv "$modules" "$merged/app"
    settle_times
    end_layer
    made_by packages "npm install"
    step "layer 4: the application"
    begin_layer app
    cat >"$merged/app/main.js" <<'JS'
// A small web service: what it requires is what a start has to read.
const express = require("express");
const fastify = require("fastify");
const _ = require("lodash");
const axios = require("axios");
const moment = require("moment");
const winston = require("winston");
const Ajv = require("ajv");
const yaml = require("js-yaml");
const graphql = require("graphql");
const mongoose = require("mongoose");
const jwt = require("jsonwebtoken");
const { Server } = require("socket.io");

const app = express();
app.get("/", (_request, response) => response.json({ time: moment().toISOString() }));
const parts = [express, fastify, _, axios, winston, Ajv, yaml, graphql, mongoose, jwt, Server].filter(Boolean).length;
const server = app.listen(8080, "127.0.0.1", () => {
    console.log(`ready node ${process.version} packages ${parts}`);
    if (!process.argv.includes("--serve")) {
        server.close();
        process.exit(0);
    }
});
JS
    settle_times
    end_layer
    made_by app "copy the application"
}
recipe_config() {
    jq -cn '{User: "nobody", Env: ["PATH=/usr/local/bin:/usr/bin:/bin", "NODE_ENV=production"], Entrypoint: ["node", "/app/main.js"], WorkingDir: "/app",
             Labels: {"example.ready": "ready node"}}'
}
