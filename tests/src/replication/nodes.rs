//! A site whose target and replicas are on nodes of their own, as far as the network goes, and reach each other over TCP.
//!
//! `carrickd` starts them by scripts, in a folder that it takes for that of its programs: one puts each replica into the namespace
//! that has its address, the other the target into its own, with the replicas' TCP addresses in its configuration.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::network::Network;
use crate::site::{Site, path_text, programs, run, wait_for};

pub const REPLICAS: usize = 3;
pub const VOLUME: &str = "vm1";
/// Of each store, and of the volume if nobody says more.
pub const STORE_BYTES: u64 = 512 << 20;
pub const VOLUME_SIZE: &str = "96M";
/// What the target is told, in the folder of the scripts.
const TARGET_CONFIG: &str = "target.json";

/// The nodes and their volume.
pub struct Nodes {
    // Dropped first: its processes keep the namespaces.
    pub site: Site,
    pub network: Network,
    pub device: PathBuf,
    /// The ids of the stores, node by node.
    stores: Vec<String>,
    scripts: TempDir,
}

impl Nodes {
    /// A volume with a replica on each node, attached.
    pub fn new() -> anyhow::Result<Self> {
        Self::with_first_store(None, VOLUME_SIZE)
    }

    /// The same, of this size, with the store of node 0 in this place.
    pub fn with_first_store(first: Option<&Path>, size: &str) -> anyhow::Result<Self> {
        let network = Network::new(REPLICAS)?;
        let scripts = tempfile::Builder::new().prefix("carrick-nodes-").tempdir()?;
        write_scripts(scripts.path(), &network)?;
        let store_size = STORE_BYTES.to_string();
        let site = Site::start_with(scripts.path().to_owned())?;
        let mut stores = Vec::new();
        for node in 0..REPLICAS {
            let path = match first.filter(|_| node == 0) {
                Some(path) => path.to_owned(),
                None => site.path(&format!("store{node}")),
            };
            if !path.exists() {
                fs::create_dir_all(&path)?;
            }
            let (path, address) = (path_text(&path)?, network.listen_address(node));
            site.carrick(&["store", "add", path, "--size", &store_size, "--listen", &address, "--insecure"])?;
            stores.push(site.store_at(path)?);
        }
        write_addresses(scripts.path(), &network, &stores)?;
        site.carrick(&["volume", "create", VOLUME, "--size", size])?;
        let device = site.attach(VOLUME, &[])?;
        Ok(Self { site, network, device, stores, scripts })
    }

    pub fn show(&self) -> anyhow::Result<Value> {
        self.site.carrick(&["volume", "show", VOLUME])
    }

    /// What the target says of a node's replica.
    pub fn replica(&self, node: usize) -> anyhow::Result<Value> {
        let shown = self.show()?;
        let replicas = shown["replicas"].as_array().context("no replicas")?;
        let found = replicas.iter().find(|replica| replica["store"] == self.stores[node]);
        found.cloned().with_context(|| format!("no replica on node {node}"))
    }

    /// The process of a node's replica.
    pub fn replica_pid(&self, node: usize) -> anyhow::Result<i32> {
        self.site.pid_of(&self.stores[node])
    }

    /// What the target was told at its start, with the replicas' addresses.
    pub fn target_config(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_slice(&fs::read(self.scripts.path().join(TARGET_CONFIG))?)?)
    }

    /// Of which term each replica's last write is, and which of that one's, as its store says.
    pub fn positions(&self) -> anyhow::Result<Vec<(u64, u64)>> {
        let position = |node: usize| {
            let store = self.site.path(&format!("store{node}"));
            let shown: Value =
                serde_json::from_str(&run(path_text(&programs()?.join("carrick-replica"))?, &["show", path_text(&store)?])?)?;
            let replica = &shown["replicas"][0];
            let number = |value: &Value| value.as_u64().with_context(|| format!("no term or no position in {shown}"));
            Ok((number(&replica["state"]["log_term"])?, number(&replica["position"])?))
        };
        (0..REPLICAS).map(position).collect()
    }

    /// A number that is shown of the attachment.
    pub fn counted(&self, name: &str) -> anyhow::Result<u64> {
        let shown = self.show()?;
        shown["attachment"][name].as_u64().with_context(|| format!("an attachment without {name}: {shown}"))
    }

    /// Waits until the target has noticed that it doesn't reach a node's replica; how long that took.
    pub fn wait_missed(&self, node: usize, limit: Duration) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let what = format!("the replica on node {node} to be missed");
        let missed = wait_for(&what, limit, || Ok((self.replica(node)?["state"] != "in-sync").then_some(())));
        missed.with_context(|| self.site.log_tail())?;
        Ok(begin.elapsed())
    }

    /// Waits until all replicas are in sync; how long that took.
    pub fn wait_in_sync(&self, limit: Duration) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let in_sync = self.site.wait_in_sync(VOLUME, limit);
        in_sync.with_context(|| format!("{}\n{:?}", self.site.log_tail(), self.show().map(|shown| shown.to_string())))?;
        Ok(begin.elapsed())
    }

    /// What was sent over each link, which must be so much at least: everything goes over them.
    pub fn sent_mib(&self, at_least: u64) -> anyhow::Result<u64> {
        let sent = (0..REPLICAS).map(|node| self.network.sent_to(node)).collect::<anyhow::Result<Vec<u64>>>()?;
        let least = sent.iter().min().copied().unwrap_or_default() >> 20;
        ensure!(least >= at_least, "of {at_least} MiB and more, {sent:?} bytes went over the links");
        Ok(least)
    }
}

fn write_scripts(folder: &Path, network: &Network) -> anyhow::Result<()> {
    let programs = programs()?;
    let programs = path_text(&programs)?;
    let nodes: String = (0..REPLICAS)
        .map(|node| {
            let (address, space) = (network.listen_address(node), network.replica(node));
            format!("*' --listen {address} '*) exec nsenter --net=/run/netns/{space} '{programs}/carrick-replica' \"$@\" ;;\n")
        })
        .collect();
    let replica = format!("#!/bin/sh\ncase \" $* \" in\n{nodes}esac\nexec '{programs}/carrick-replica' \"$@\"\n");
    // Called as `carrick-target run --config FILE --run-dir FOLDER`.
    let (folder_text, target) = (path_text(folder)?, network.target());
    let target = format!(
        "#!/bin/sh\nset -e\nsed -f '{folder_text}/addresses' \"$3\" >'{folder_text}/{TARGET_CONFIG}'\n\
         exec nsenter --net=/run/netns/{target} '{programs}/carrick-target' run --config '{folder_text}/{TARGET_CONFIG}' --run-dir \"$5\" --insecure\n"
    );
    for (name, text) in [("carrick-replica", replica), ("carrick-target", target)] {
        let path = folder.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// What `sed` makes of the Unix sockets in the target's configuration.
fn write_addresses(folder: &Path, network: &Network, stores: &[String]) -> anyhow::Result<()> {
    let line = |(node, store): (usize, &String)| format!("s|\"unix:[^\"]*/{store}\\.sock\"|\"tcp:{}\"|\n", network.listen_address(node));
    let lines: String = stores.iter().enumerate().map(line).collect();
    fs::write(folder.join("addresses"), lines)?;
    Ok(())
}
