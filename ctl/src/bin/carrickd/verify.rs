//! Having a volume's replicas compared, when somebody asks for it and by itself: the target does it, and tells how far it is with its
//! status. What came of it is written down, so that it outlives the target.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use carrick_backing_store::VolumeId;
use carrick_ctl::fault::{Fault, Reason};
use carrick_ctl::name::VolumeName;
use carrick_replicator::control::{TargetRequest, VerificationReport};

use crate::context::{Context, unix_now};
use crate::control;
use crate::metadata::{AttachmentPhase, Mutation, State, VerifiedRecord, VolumePhase, VolumeRecord};
use crate::volumes::{parse_name, ready};

/// How often a target is asked how far it is: 16 MiB at a time take 10 ms at least, so a terabyte takes eleven minutes.
const POLL: Duration = Duration::from_secs(1);
/// After so many polls without progress nobody waits for the end any more: the target doesn't answer, or has no two replicas to compare, for
/// who knows how long. It goes on with what it has begun as soon as it can, and is asked again later.
const STALLED_MAX: u32 = 60;
/// When a comparison that didn't come to its end is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(3600);
/// How often it is looked what is due: volumes come and go.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// The volumes whose comparison is followed to its end: each once, whoever asks how often.
#[derive(Debug, Default)]
pub struct Verifications(Mutex<BTreeSet<VolumeId>>);

impl Verifications {
    /// `false` if somebody follows it already.
    fn begin(&self, volume: VolumeId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(volume)
    }

    fn end(&self, volume: VolumeId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&volume);
    }
}

/// Begins a comparison, as somebody asks.
pub async fn verify(context: &Arc<Context>, name: &str) -> Result<VolumeId, Fault> {
    let name = parse_name(name)?;
    let state = context.state();
    let volume = ready(&state, &name)?;
    if volume.replicas.len() < 2 {
        let message = format!("volume {name} has one replica: there is nothing to compare it with");
        return Err(Fault::new(Reason::NothingToVerify, &name, message));
    }
    if !state.attachments.contains_key(&volume.id) {
        let message = format!("volume {name} isn't attached, and its replicas are compared by its target: attach it first");
        return Err(Fault::new(Reason::VolumeNotAttached, &name, message));
    }
    begin(context, volume.id, &name).await?;
    let (context, volume) = (Arc::clone(context), volume.id);
    tokio::spawn(async move { follow(&context, volume).await });
    Ok(volume)
}

async fn begin(context: &Context, volume: VolumeId, name: &VolumeName) -> Result<(), Fault> {
    let asked = control::set_target(&context.run.target_control(volume), &TargetRequest::Verify).await;
    asked.map_err(|error| {
        Fault::new(Reason::TargetUnreachable, name, format!("volume {name} can't be verified: its carrick-target {error}"))
    })
}

/// Waits for the end of a comparison, unless somebody does already, and writes down what came of it. `false` if it came to no end.
async fn follow(context: &Context, volume: VolumeId) -> bool {
    if !context.verifications.begin(volume) {
        return true;
    }
    let report = wait_for_end(context, volume).await;
    let written = match &report {
        Some(report) => write_down(context, volume, report).await,
        None => false,
    };
    context.verifications.end(volume);
    written
}

/// What it came to; `None` if nobody knows any more.
async fn wait_for_end(context: &Context, volume: VolumeId) -> Option<VerificationReport> {
    let mut progress = Progress::default();
    while context.state().attachments.contains_key(&volume) {
        let status = control::target_status(&context.run.target_control(volume)).await;
        if let ControlFlow::Break(end) = progress.on_poll(status.ok().map(|status| status.verification)) {
            return end;
        }
        tokio::time::sleep(POLL).await;
    }
    None
}

/// How far a comparison is that is waited for.
#[derive(Clone, Debug, Default)]
struct Progress {
    /// Where there are many differences, these alone become more for a while.
    last: VerificationReport,
    /// For how many polls it is so.
    stalled: u32,
}

impl Progress {
    /// The target's answer, if it gave one. Ends with what the comparison came to, if anybody knows.
    fn on_poll(&mut self, answer: Option<Option<VerificationReport>>) -> ControlFlow<Option<VerificationReport>> {
        match answer {
            Some(Some(report)) if !report.running => return ControlFlow::Break(Some(report)),
            // It was started since then.
            Some(None) => return ControlFlow::Break(None),
            Some(Some(report)) if report != self.last => *self = Self { last: report, stalled: 0 },
            Some(Some(_)) | None => self.stalled += 1,
        }
        if self.stalled < STALLED_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(None) }
    }
}

async fn write_down(context: &Context, volume: VolumeId, report: &VerificationReport) -> bool {
    let VerificationReport { skipped, repaired, unsettled, .. } = *report;
    let verified = Some(VerifiedRecord { at_unix: unix_now(), skipped, repaired, unsettled });
    let Some(name) = context.state().volumes.get(&volume).map(|record| record.name.clone()) else { return false };
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let Some(record) = state.volumes.get(&volume) else { return false };
    let new = VolumeRecord { verified, ..record.clone() };
    let written = context.apply(Mutation::ReplaceVolume { expected: record.clone().into(), new: new.into() }).await;
    if let Err(error) = &written {
        tracing::warn!(volume = %name, %error, "what came of the comparison of the replicas can't be written down");
    }
    written.is_ok()
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Verify(VolumeId),
    Wait(Duration),
}

/// Whose comparison has been due for longest; `failed` says when one came to no end. A volume counts as compared when it is made.
fn next(state: &State, every: Duration, failed: &BTreeMap<VolumeId, u64>, now: u64) -> Next {
    let is_attached =
        |volume: &&VolumeRecord| state.attachments.get(&volume.id).is_some_and(|attachment| attachment.phase == AttachmentPhase::Attached);
    let due = |volume: &VolumeRecord| {
        let last = volume.verified.map_or(volume.created_unix, |verified| verified.at_unix);
        // A clock that was ahead when it was written down must not put it off for ever.
        let regular = last.min(now).saturating_add(every.as_secs());
        failed.get(&volume.id).map_or(regular, |at| regular.max(at.min(&now).saturating_add(TRY_AGAIN.as_secs())))
    };
    let comparable = |volume: &&VolumeRecord| volume.phase == VolumePhase::Ready && volume.config().members.len() > 1;
    let volumes = state.volumes.values().filter(comparable).filter(is_attached);
    match volumes.map(|volume| (due(volume), volume.id)).min() {
        Some((at, volume)) if at <= now => Next::Verify(volume),
        Some((at, _)) => Next::Wait(Duration::from_secs(at - now).min(LOOK_AGAIN)),
        None => Next::Wait(LOOK_AGAIN),
    }
}

/// Compares the replicas of one volume after the other, whenever it is due, until the daemon ends.
pub async fn run(context: Arc<Context>, every: Duration) {
    let mut failed = BTreeMap::new();
    loop {
        let state = context.state();
        failed.retain(|volume, _| state.volumes.contains_key(volume));
        let volume = match next(&state, every, &failed, unix_now()) {
            Next::Verify(volume) => volume,
            Next::Wait(time) => {
                tokio::time::sleep(time).await;
                continue;
            }
        };
        let Some(record) = state.volumes.get(&volume) else { continue };
        let is_begun = match begin(&context, volume, &record.name).await {
            Ok(()) => follow(&context, volume).await,
            Err(error) => {
                tracing::debug!(volume = %record.name, %error, "a comparison of the replicas is due and can't begin");
                false
            }
        };
        if is_begun {
            failed.remove(&volume);
        } else {
            failed.insert(volume, unix_now());
        }
        // Somebody else may follow this one.
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::ByteLength;

    use super::*;
    use crate::metadata::tests::{attachment, volume};

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn id(number: u8) -> VolumeId {
        volume(number, "x", &[1]).id
    }

    #[test]
    fn the_end_is_waited_for_as_long_as_there_is_progress() {
        let report =
            |running, blocks: u64| VerificationReport { running, compared: ByteLength::new(blocks), ..VerificationReport::default() };
        let repairing = |repaired: u64| VerificationReport { repaired, ..report(true, 33) };
        let mut progress = Progress::default();
        for step in 1..1000 {
            assert_eq!(progress.on_poll(Some(Some(report(true, step / 30)))), ControlFlow::Continue(()));
        }
        for step in 1..1000 {
            assert_eq!(progress.on_poll(Some(Some(repairing(step / 30)))), ControlFlow::Continue(()));
        }
        assert_eq!(progress.clone().on_poll(Some(Some(report(false, 40)))), ControlFlow::Break(Some(report(false, 40))));
        assert_eq!(progress.on_poll(Some(None)), ControlFlow::Break(None));
        // One that can't go on, and one that doesn't answer.
        for answer in [Some(Some(report(true, 33))), None] {
            let mut stuck = Progress { last: report(true, 33), stalled: 0 };
            let polls = (1..).find(|_| stuck.on_poll(answer.clone()).is_break()).unwrap();
            assert_eq!(polls, STALLED_MAX);
        }
    }

    #[test]
    fn the_volume_that_was_compared_longest_ago_is_next() {
        let mut state = State::default();
        let now = 100 * DAY.as_secs();
        let ago = |days: u64| now - days * DAY.as_secs();
        let verified = |at_unix| Some(VerifiedRecord { at_unix, skipped: ByteLength::ZERO, repaired: 0, unsettled: 0 });
        let mut put = |number: u8, created: u64, at: Option<u64>, stores: &[u8]| {
            let record =
                VolumeRecord { created_unix: created, verified: at.and_then(verified), ..volume(number, &format!("vm{number}"), stores) };
            state.attachments.insert(record.id, attachment(number, AttachmentPhase::Attached));
            state.volumes.insert(record.id, record);
        };
        put(1, ago(50), Some(ago(9)), &[1, 2, 3]);
        put(2, ago(50), Some(ago(8)), &[1, 2, 3]);
        put(3, ago(10), None, &[1, 2]);
        put(4, ago(90), None, &[1]);
        let week = 7 * DAY;
        let mut failed = BTreeMap::new();
        assert_eq!(next(&state, week, &failed, now), Next::Verify(id(3)), "one replica alone is nothing to compare");
        failed.insert(id(3), now - 5);
        assert_eq!(next(&state, week, &failed, now), Next::Verify(id(1)), "one that came to no end is tried again later");
        assert_eq!(next(&state, week, &failed, now + TRY_AGAIN.as_secs()), Next::Verify(id(1)));
        state.attachments.remove(&id(1));
        assert_eq!(next(&state, week, &failed, now), Next::Verify(id(2)));
        state.attachments.remove(&id(2));
        assert_eq!(next(&state, week, &failed, now), Next::Wait(LOOK_AGAIN));
        failed.clear();
        let soon = next(&state, 10 * DAY + Duration::from_secs(30), &failed, now);
        assert_eq!(soon, Next::Wait(Duration::from_secs(30)));
        // The clock has been put back by years.
        let back = ago(99);
        assert_eq!(next(&state, DAY, &failed, back), Next::Wait(LOOK_AGAIN));
        assert_eq!(next(&state, Duration::ZERO, &failed, back), Next::Verify(id(3)));
    }
}
