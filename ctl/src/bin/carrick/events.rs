//! What happened, and what happens: reading the daemon's log, and following it across the daemon's restarts.

use std::path::Path;
use std::time::Duration;

use carrick_ctl::fault;
use carrick_ctl::v1::{Event, ReadEventsRequest};
use clap::Args;
use tonic::{Code, Status};

use crate::client::Client;
use crate::report::Problem;

/// First pause before the daemon is looked for again, while following; doubled up to [`AGAIN_MAX`].
const AGAIN_MIN: Duration = Duration::from_millis(100);
/// Longest pause: somebody watches, and a look costs nothing.
const AGAIN_MAX: Duration = Duration::from_secs(2);

/// Which events.
#[derive(Debug, Args)]
pub struct Events {
    /// Of this volume only: its name, also if it is deleted, or its id
    pub volume: Option<String>,
    /// About this store only, and the replicas in it: its path, its id, or the beginning of that
    #[arg(long, conflicts_with = "volume")]
    pub store: Option<String>,
    /// Only those after this number (--json shows numbers)
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub since: u64,
    /// Go on with what happens from now on, also across a restart of carrickd, until it is interrupted
    #[arg(long, short)]
    pub follow: bool,
}

impl Events {
    /// What the daemon is asked.
    pub fn request(self) -> ReadEventsRequest {
        ReadEventsRequest { volume: self.volume, store: self.store, since: self.since, follow: self.follow }
    }
}

/// Why reading has ended before the daemon said all.
enum Broken {
    /// The daemon, or the connection to it, is gone.
    Away,
    /// For good.
    Failed(Problem),
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        // What the daemon itself says is final; all else is said by a connection that has ended, one way or the other.
        if fault::detail(&status).is_some() || status.code() == Code::Unimplemented { Self::Failed(status.into()) } else { Self::Away }
    }
}

/// All that there is.
pub async fn read(client: &Client, request: ReadEventsRequest) -> Result<Vec<Event>, Problem> {
    let mut answers = client.events().read_events(request).await?.into_inner();
    let mut events = Vec::new();
    while let Some(answer) = answers.message().await? {
        events.extend(answer.event);
    }
    Ok(events)
}

/// All that there is, and what is added. `tell` says whether anybody still listens: else it ends. `away` is told that the daemon is gone.
pub async fn follow(
    socket: &Path,
    client: Client,
    mut request: ReadEventsRequest,
    mut tell: impl FnMut(&Event) -> Result<bool, Problem>,
    mut away: impl FnMut(),
) -> Result<(), Problem> {
    let (mut connected, mut pause) = (Some(client), AGAIN_MIN);
    loop {
        if let Some(client) = connected {
            let before = request.since;
            match follow_once(&client, &mut request, &mut tell).await {
                Ok(()) => return Ok(()),
                Err(Broken::Failed(problem)) => return Err(problem),
                Err(Broken::Away) if request.since != before => pause = AGAIN_MIN,
                Err(Broken::Away) => {}
            }
            away();
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN_MAX);
        connected = Client::connect(socket).await.ok();
    }
}

/// Until nobody listens any more.
async fn follow_once(
    client: &Client,
    request: &mut ReadEventsRequest,
    tell: &mut impl FnMut(&Event) -> Result<bool, Problem>,
) -> Result<(), Broken> {
    let mut answers = client.events().read_events(request.clone()).await?.into_inner();
    while let Some(answer) = answers.message().await? {
        let Some(event) = answer.event else { continue };
        request.since = event.number;
        if !tell(&event).map_err(Broken::Failed)? {
            return Ok(());
        }
    }
    Err(Broken::Away)
}

#[cfg(test)]
mod tests {
    use carrick_ctl::fault::{Fault, Reason};

    use super::*;

    #[test]
    fn only_what_the_daemon_says_itself_ends_following() {
        let fault = Status::from(Fault::new(Reason::VolumeNotFound, "vm1", "no"));
        for (status, ends) in [
            (fault, true),
            (Status::unimplemented("an older daemon"), true),
            (Status::unavailable("connection refused"), false),
            (Status::unknown("h2 protocol error: error reading a body from connection"), false),
            (Status::cancelled("the daemon was killed"), false),
        ] {
            assert_eq!(matches!(Broken::from(status.clone()), Broken::Failed(_)), ends, "{status}");
        }
    }
}
