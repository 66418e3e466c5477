//! The replicas of a volume beside each other.

use anyhow::{Context, ensure};
use carrick_backing_store::{BlockIndex, VolumeId};
use serde_json::Value;

use crate::first_volume::chaos::COPY_LIMIT;
use crate::peer::Peer;
use crate::site::Site;

/// What is said of each replica of a volume.
pub fn replicas_of(site: &Site, volume: &str) -> anyhow::Result<Vec<Value>> {
    site.carrick(&["volume", "show", volume])?["replicas"].as_array().cloned().context("no replicas")
}

/// Reads all replicas of a detached volume whole; how many bytes they have in common, which must be all.
pub fn identical(site: &Site, volume: &str) -> anyhow::Result<u64> {
    let shown = site.carrick(&["volume", "show", volume])?;
    let size = shown["size_bytes"].as_u64().context("a volume without size")?;
    let mut first = None;
    for replica in shown["replicas"].as_array().context("no replicas")? {
        let digest = peer(site, &shown, replica)?.digest(size)?;
        ensure!(*first.get_or_insert(digest) == digest, "the replica in store {} differs from the first", replica["store"]);
    }
    Ok(size)
}

/// The same of one that is attached: once all its replicas are in sync, it is detached for that.
pub fn identical_at_last(site: &Site, volume: &str) -> anyhow::Result<u64> {
    site.wait_in_sync(volume, COPY_LIMIT)?;
    site.detach(volume)?;
    identical(site, volume)
}

/// Writes something else into these blocks of one replica of a detached volume, with checksums that are right.
pub fn tamper(site: &Site, volume: &str, index: usize, blocks: &[u64]) -> anyhow::Result<()> {
    let shown = site.carrick(&["volume", "show", volume])?;
    let mut peer = peer(site, &shown, &shown["replicas"][index])?;
    blocks.iter().try_for_each(|block| peer.overwrite(BlockIndex::new(*block)))
}

/// A connection to a replica of a volume, past a promise.
fn peer(site: &Site, volume: &Value, replica: &Value) -> anyhow::Result<Peer> {
    let id: VolumeId = volume["id"].as_str().context("a volume without id")?.parse()?;
    let store = replica["store"].as_str().context("a replica without store")?;
    let mut peer = Peer::connect(&site.path(&format!("run/replica/{store}.sock")), id)?;
    peer.take_over()?;
    Ok(peer)
}
