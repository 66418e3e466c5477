//! The replicas of a volume beside each other.

use anyhow::{Context, ensure};
use carrick_backing_store::VolumeId;

use crate::peer::Peer;
use crate::site::Site;

/// Reads all replicas of a detached volume whole; how many bytes they have in common, which must be all.
pub fn identical(site: &Site, volume: &str) -> anyhow::Result<u64> {
    let shown = site.carrick(&["volume", "show", volume])?;
    let id: VolumeId = shown["id"].as_str().context("a volume without id")?.parse()?;
    let size = shown["size_bytes"].as_u64().context("a volume without size")?;
    let mut first = None;
    for replica in shown["replicas"].as_array().context("no replicas")? {
        let store = replica["store"].as_str().context("a replica without store")?;
        let mut peer = Peer::connect(&site.path(&format!("run/replica/{store}.sock")), id)?;
        peer.take_over()?;
        let digest = peer.digest(size)?;
        ensure!(*first.get_or_insert(digest) == digest, "the replica in store {store} differs from the first");
    }
    Ok(size)
}
