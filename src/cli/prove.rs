//! `firstread verify --offline`: is everything that an image needs local, and right? Asks no source.

use super::Outcome;
use super::connect::connect_or_start;
use super::options::Context;
use super::output::size;
use super::pool::follow;
use super::reference::image;
use crate::daemon::control::{Call, Kind, Problem};
use crate::daemon::proof::Proof;

/// Runs the verb.
///
/// # Errors
/// An image of which something is not local, or damaged.
pub fn run(context: &Context, reference: &str) -> Outcome {
    let reference = image(reference)?.to_string();
    let mut client = connect_or_start(context)?;
    let proof: Proof = follow(context, "checking", || client.call(Call::Prove { reference: reference.clone() }))?;
    context.output.answer(&proof, text)?;
    if proof.sound {
        return Ok(());
    }
    let (lacking, chunks) = (proof.chunks - proof.local_chunks, proof.chunks);
    let message = format!("{}: {lacking} of {chunks} chunks are not local", proof.image);
    Err(Problem::new(Kind::Failed, message).hint(format!("`firstread pin {}` fetches them", proof.image)))
}

fn text(proof: &Proof) -> String {
    let mut text = String::new();
    for fault in &proof.faults {
        text.push_str(&format!("LACKING chunk {}\n  {}\n", fault.chunk, fault.reason));
    }
    let lacking = proof.chunks - proof.local_chunks;
    if lacking > proof.faults.len() as u64 {
        text.push_str(&format!("and {} more\n", lacking - proof.faults.len() as u64));
    }
    let Proof { image, local_chunks, chunks, local_bytes, .. } = proof;
    let kept = if proof.pinned { "pinned" } else { "not pinned: what is not used may be evicted" };
    let local = format!("{local_chunks} of {chunks} chunks ({}) are local and right", size(*local_bytes));
    text.push_str(&format!("{image}: {local}; {kept}"));
    text
}
