//! A registry with an image in it. Those who include it include `packs` and `registry` as well.

use firstread::oci::Reference;
use firstread::source::{Access, Purpose, Repository};

use crate::packs::{Lies, TestImage};
use crate::registry::Registry;

/// A registry, and the image `app:v1` in it: so many chunks of so many bytes, which no image of another seed has.
pub fn published(seed: u64, chunks: usize, chunk: usize) -> (Registry, TestImage) {
    let registry = Registry::start();
    let image = TestImage::build(seed, chunks, chunk, Lies::default());
    let reference: Reference = format!("{}/app:v1", registry.host()).parse().unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let access = Access { docker_config: None, ..Access::default() };
        image.push(&Repository::open(&reference, &access, Purpose::Push).await.unwrap()).await
    });
    (registry, image)
}
