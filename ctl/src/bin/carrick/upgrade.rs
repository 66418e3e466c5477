//! `carrick node upgrade`: asks for it, and watches how it goes on.

use std::path::Path;
use std::time::{Duration, Instant};

use carrick_ctl::fault::{Fault, Reason};
use carrick_ctl::v1;
use clap::Args;

use crate::client::{Client, question};
use crate::report::Problem;

/// Between two looks at how far it is.
const POLL: Duration = Duration::from_millis(200);
/// Nothing has changed for so long: it can't go on by itself. A process that doesn't answer is reported after 20 s.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// How to upgrade.
#[derive(Debug, Args)]
pub struct Upgrade {
    /// Only say what would be replaced
    #[arg(long, conflicts_with = "wait")]
    pub dry_run: bool,
    /// Return when it is done, and show how it goes on; fails when it waits for something that doesn't come
    #[arg(long)]
    pub wait: bool,
}

/// Returns when no upgrade is asked for any more. carrickd may be killed meanwhile: the next one goes on.
pub async fn wait(socket: &Path, mut tell: impl FnMut(&str) -> Result<(), Problem>) -> Result<(), Problem> {
    let (mut shown, mut since) = (String::new(), Instant::now());
    loop {
        let (left, why) = match look(socket).await {
            Ok(None) => return Ok(()),
            Ok(Some(v1::Upgrade { left, waiting_for, .. })) => (format!("{left} left"), waiting_for),
            Err(problem) => ("carrickd is away".to_owned(), Some(problem.message().to_owned())),
        };
        let progress = why.as_ref().map_or_else(|| left.clone(), |why| format!("{left}; waits: {why}"));
        if progress != shown {
            tell(&progress)?;
            (shown, since) = (progress, Instant::now());
        } else if since.elapsed() >= STUCK_AFTER {
            let why = why.unwrap_or_else(|| "nothing happens".to_owned());
            let message = format!("the upgrade can't go on, and does so by itself when that is over ({left}): {why}");
            return Err(Fault::new(Reason::UpgradeWaits, "node", message).into());
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn look(socket: &Path) -> Result<Option<v1::Upgrade>, Problem> {
    let client = Client::connect(socket).await?;
    Ok(client.node().get_status(question(v1::GetStatusRequest {})).await?.into_inner().upgrade)
}
