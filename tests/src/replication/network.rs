//! A network of its own: a namespace for the target and one for each replica, and a link from the target to each replica whose both
//! directions can be made worse. Dropping it takes all of it away, also after a failure.

use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;

use crate::site::run;

/// Where each replica listens.
const PORT: u16 = 7100;
/// The device at a replica's end of its link.
const REPLICA_DEVICE: &str = "target";

/// The same of another host's link.
const OTHER_DEVICE: &str = "other";
/// Its links have addresses so much further on.
const OTHER: usize = 100;

/// What is sent on a link, by which end of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToReplica,
    FromReplica,
}

pub const BOTH: [Way; 2] = [Way::ToReplica, Way::FromReplica];

/// The namespaces and links.
pub struct Network {
    prefix: String,
    replicas: usize,
}

impl Network {
    pub fn new(replicas: usize) -> anyhow::Result<Self> {
        // Known from here on, so that a half of it is taken away, too.
        let network = Self { prefix: format!("carrick-{}", std::process::id()), replicas };
        let target = network.target();
        ip(&["netns", "add", &target])?;
        for node in 0..replicas {
            let [near, far] = addresses(node);
            ip(&["netns", "add", &network.replica(node)])?;
            network.link(&target, &near, node, REPLICA_DEVICE, &far)?;
        }
        Ok(network)
    }

    /// The namespace of the target.
    pub fn target(&self) -> String {
        format!("{}-target", self.prefix)
    }

    /// The namespace of another host, if there is one.
    pub fn other(&self) -> String {
        format!("{}-other", self.prefix)
    }

    /// Adds another host, which reaches the replicas at the same addresses, over links of its own.
    pub fn add_other(&self) -> anyhow::Result<()> {
        let other = self.other();
        ip(&["netns", "add", &other])?;
        for node in 0..self.replicas {
            let device = target_device(node);
            let [near, far] = addresses(OTHER + node);
            self.link(&other, &near, node, OTHER_DEVICE, &far)?;
            ip(&["-n", &other, "route", "add", &addresses(node)[1], "via", &far, "dev", &device])?;
        }
        Ok(())
    }

    /// A link between a host and a replica.
    fn link(&self, host: &str, near: &str, node: usize, far_device: &str, far: &str) -> anyhow::Result<()> {
        let (replica, device) = (self.replica(node), target_device(node));
        ip(&["-n", host, "link", "add", &device, "type", "veth", "peer", "name", far_device, "netns", &replica])?;
        for (space, device, address) in [(host, device.as_str(), near), (&replica, far_device, far)] {
            ip(&["-n", space, "address", "add", &format!("{address}/30"), "dev", device])?;
            ip(&["-n", space, "link", "set", device, "up"])?;
        }
        Ok(())
    }

    /// The namespace of a replica.
    pub fn replica(&self, node: usize) -> String {
        format!("{}-replica{node}", self.prefix)
    }

    /// Where a replica listens, as IP:PORT.
    pub fn listen_address(&self, node: usize) -> String {
        format!("{}:{PORT}", addresses(node)[1])
    }

    /// Makes ways of a replica's link worse, as tc-netem(8) says.
    pub fn impair(&self, node: usize, ways: &[Way], how: &[&str]) -> anyhow::Result<()> {
        for way in ways {
            self.qdisc(node, *way, "replace", &[&["netem", "limit", "100000"], how].concat())?;
        }
        Ok(())
    }

    /// Loses all that is sent on ways of a replica's link. Nobody is told: no device goes down, no connection is reset.
    pub fn cut(&self, node: usize, ways: &[Way]) -> anyhow::Result<()> {
        self.impair(node, ways, &["loss", "100%"])
    }

    /// Makes them good again.
    pub fn heal(&self, node: usize, ways: &[Way]) -> anyhow::Result<()> {
        ways.iter().try_for_each(|way| self.qdisc(node, *way, "delete", &[]))
    }

    /// Cuts the target off from all replicas, both ways.
    pub fn cut_all(&self) -> anyhow::Result<()> {
        (0..self.replicas).try_for_each(|node| self.cut(node, &BOTH))
    }

    /// The end of that.
    pub fn heal_all(&self) -> anyhow::Result<()> {
        (0..self.replicas).try_for_each(|node| self.heal(node, &BOTH))
    }

    fn qdisc(&self, node: usize, way: Way, action: &str, how: &[&str]) -> anyhow::Result<()> {
        let (space, device) = self.end(node, way);
        run("tc", &[&["-n", &space, "qdisc", action, "dev", &device, "root"], how].concat()).map(drop)
    }

    /// The namespace and the device from which that is sent.
    fn end(&self, node: usize, way: Way) -> (String, String) {
        match way {
            Way::ToReplica => (self.target(), target_device(node)),
            Way::FromReplica => (self.replica(node), REPLICA_DEVICE.to_owned()),
        }
    }

    /// How many packets a replica's impaired link has lost, both ways.
    pub fn lost(&self, node: usize) -> anyhow::Result<u64> {
        let lost = |way| {
            let (space, device) = self.end(node, way);
            let said = run("tc", &["-n", &space, "-json", "-statistics", "qdisc", "show", "dev", &device, "root"])?;
            let shown: Value = serde_json::from_str(&said)?;
            shown[0]["drops"].as_u64().with_context(|| format!("no drops in {shown}"))
        };
        Ok(lost(Way::ToReplica)? + lost(Way::FromReplica)?)
    }

    /// What the target has sent to a replica, in bytes.
    pub fn sent_to(&self, node: usize) -> anyhow::Result<u64> {
        let said = ip(&["-n", &self.target(), "-json", "-statistics", "link", "show", &target_device(node)])?;
        let links: Value = serde_json::from_str(&said)?;
        links[0]["stats64"]["tx"]["bytes"].as_u64().context("a link that doesn't say what was sent")
    }

    /// How long it takes to connect to a replica from where the target is.
    pub fn time_to_connect(&self, node: usize) -> anyhow::Result<Duration> {
        let (space, [_, address]) = (format!("--net=/run/netns/{}", self.target()), addresses(node));
        let begin = Instant::now();
        run("nsenter", &[&space, "bash", "-c", &format!("exec 3<>/dev/tcp/{address}/{PORT}")])?;
        Ok(begin.elapsed())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in (0..self.replicas).map(|node| self.replica(node)).chain([self.target(), self.other()]) {
            // The links go with it. It may not be there, if it could not be made.
            let _ = ip(&["netns", "delete", &name]);
        }
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    run("ip", arguments)
}

/// The device at the target's end of a replica's link.
fn target_device(node: usize) -> String {
    format!("replica{node}")
}

/// The target's and the replica's address on their link, of a range that is for such tests (RFC 2544).
fn addresses(node: usize) -> [String; 2] {
    [1, 2].map(|end| format!("198.18.{node}.{end}"))
}
