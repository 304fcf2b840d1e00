//! A registry behind TLS: trusted by what `certs.d` says, with a password from a file or a credential helper.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/packs.rs"]
mod packs;
#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use firstread::Error;
use firstread::chunk::Digest;
use firstread::oci::Reference;
use firstread::source::{Access, Content, Purpose, Repository};
use registry::Registry;

fn access(dir: &Path, docker_config: &Path) -> Access {
    let patience = Duration::from_secs(5);
    Access {
        hosts_dir: dir.join("certs.d"),
        docker_config: Some(docker_config.to_owned()),
        connect: patience,
        stall: patience,
        ..Access::default()
    }
}

fn configure(dir: &Path, host: &str, text: &str) {
    let dir = dir.join("certs.d").join(host);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), text).unwrap();
}

async fn push(host: &str, access: &Access) -> firstread::Result<()> {
    let reference: Reference = format!("{host}/app:v1").parse().unwrap();
    let repository = Repository::open(&reference, access, Purpose::Push).await?;
    let bytes = host.as_bytes().to_vec();
    let (digest, len) = (Digest::of(&bytes), bytes.len() as u64);
    repository.push_blob(&digest, len, &Content::Bytes(bytes.clone().into())).await?;
    assert_eq!(repository.small_blob(&digest, len, 1000).await?, bytes);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_a_private_authority_is_trusted_when_certs_d_says_so() {
    let (registry, dir) = (Registry::with_tls(), tempfile::tempdir().unwrap());
    let (host, dir) = (registry.host(), dir.path());
    let access = access(dir, &registry.docker_config());
    let server = format!("server = \"https://{host}\"\n");
    configure(dir, &host, &server);
    let error = push(&host, &access).await.unwrap_err();
    assert!(matches!(&error, Error::Unreachable { .. }) && error.to_string().contains("certificate"), "{error}");

    configure(dir, &host, &format!("{server}ca = \"{}\"\n", registry.ca().display()));
    push(&host, &access).await.unwrap();
    // Beside the file, named from there.
    std::fs::copy(registry.ca(), dir.join("certs.d").join(&host).join("authority.pem")).unwrap();
    configure(dir, &host, &format!("{server}ca = [\"authority.pem\"]\n"));
    push(&host, &access).await.unwrap();
    configure(dir, &host, &format!("{server}skip_verify = true\n"));
    push(&host, &access).await.unwrap();

    for (text, wanted) in
        [("ca = \"absent.pem\"", "absent.pem"), ("server = ", "hosts.toml"), ("server = \"ftp://x\"", "URL")]
    {
        configure(dir, &host, text);
        let error = push(&host, &access).await.unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_comes_from_a_credential_helper() {
    let (registry, node) = (Registry::with_password(), program::Node::new());
    let (host, dir) = (registry.host(), node.path());
    let reference: Reference = format!("{host}/app:v1").parse().unwrap();
    let with_file = access(dir, &registry.docker_config());
    let repository = Repository::open(&reference, &with_file, Purpose::Push).await.unwrap();
    packs::TestImage::build(1, 4, 4096, packs::Lies::default()).push(&repository).await;

    let config = dir.join("helper.json");
    let helper = dir.join("docker-credential-firstread-test");
    let inspect = |password: &str| {
        let script = format!(
            "#!/bin/sh\nread -r server\n[ \"$server\" = {host} ] || exit 1\n\
             echo '{{\"ServerURL\":\"{host}\",\"Username\":\"{}\",\"Secret\":\"{password}\"}}'\n",
            registry::USER
        );
        std::fs::write(&helper, script).unwrap();
        std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
        let image = format!("{host}/app:v1");
        let arguments = ["inspect", &image, "--docker-config", config.to_str().unwrap()];
        node.command(&arguments).env("PATH", path).output().unwrap()
    };
    for setting in
        [format!(r#"{{"credHelpers":{{"{host}":"firstread-test"}}}}"#), r#"{"credsStore":"firstread-test"}"#.into()]
    {
        std::fs::write(&config, setting).unwrap();
        let output = inspect(registry::PASSWORD);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!inspect("wrong").status.success());
    }
}
