//! Attaching and detaching.
//!
//! **Order of an attachment:** 1. the record, *attaching*: the node's loop starts the target; 2. the device answers; 3. the
//! record, *attached*; 4. the answer. Until 3 nobody was told of the device, so if the target gives up, or takes too long,
//! the attachment is taken back: nothing happens later behind the operator's back. After 3 the target is kept alive
//! whatever it says: a VM may wait for it.
//!
//! **Order of a detachment:** 1. the record, *detaching*; 2. the target takes the device away and ends; 3. the record goes.
//! Only a target can take its device away (a dead one's device waits in the kernel), so until 2 one is kept running. If
//! the device is in use, the record is *attached* again.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use carrick_backing_store::VolumeId;
use carrick_ctl::fault::{Fault, Reason};
use carrick_ctl::v1;
use carrick_replicator::control::{ControlError, ControlErrorCode, Map, TargetPhase, TargetStatus};
use carrick_replicator::engine::Attachment;

use crate::context::{Context, unix_now};
use crate::control::{self, CallError};
use crate::launch;
use crate::metadata::{AttachmentPhase, AttachmentRecord, Mutation, Task, VolumeRecord};
use crate::observed::{Event, Exit, Process, ProcessId};
use crate::volumes::{not_found, parse_name, ready};
use crate::{operations, placement, survey};

/// Requests in flight if nobody says how many: what virtio disks have.
pub const QUEUE_DEPTH_DEFAULT: u32 = 128;
/// What the target takes.
const QUEUE_DEPTH_MAX: u32 = 512;
/// For a device to come up: many times what an election and a reconciliation take, and short enough for somebody who waits.
const ATTACH_LIMIT: Duration = Duration::from_secs(30);
/// For a target that died a moment ago to answer again.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// For a target that is done to be gone, the kill of one that isn't included.
const GONE_LIMIT: Duration = Duration::from_secs(20);
/// First pause between two questions to a target that is coming up; doubled up to [`POLL_MAX`].
const POLL_MIN: Duration = Duration::from_millis(5);
/// Longest pause between two questions.
const POLL_MAX: Duration = Duration::from_millis(200);

/// How a volume is to be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether the host itself uses the device.
    pub host: bool,
    /// Requests in flight at most.
    pub queue_depth: u16,
    /// Whether users get a mapped device.
    pub map: Map,
}

impl Options {
    /// Checks what came in a request.
    pub fn new(request: &v1::AttachVolumeRequest) -> Result<Self, Fault> {
        let v1::AttachVolumeRequest { host, queue_depth, map, .. } = *request;
        let map = match v1::Map::try_from(map) {
            Ok(v1::Map::Auto) => Map::Auto,
            Ok(v1::Map::Always) => Map::Always,
            Ok(v1::Map::Never) => Map::Never,
            Err(_) => return Err(Fault::invalid("map", format!("{map} is no way to map a device: update carrickd"))),
        };
        let depth = queue_depth.unwrap_or(QUEUE_DEPTH_DEFAULT);
        match u16::try_from(depth) {
            Ok(queue_depth) if (1..=QUEUE_DEPTH_MAX).contains(&depth) => Ok(Self { host, queue_depth, map }),
            _ => Err(Fault::invalid("queue_depth", format!("queue depth {depth} is not possible: it is 1 to {QUEUE_DEPTH_MAX}"))),
        }
    }
}

/// The device of an attached volume, if its target says so now.
pub async fn device(context: &Context, volume: VolumeId) -> Option<PathBuf> {
    survey::targets(context, [volume]).await.remove(&volume)?.ok()?.device
}

/// Attaches a volume and returns its device.
pub async fn attach(context: &Context, name: &str, options: Options) -> Result<PathBuf, Fault> {
    let name = parse_name(name)?;
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let volume = state.volume_by_name(&name).ok_or_else(|| not_found(&name))?;
    match state.attachments.get(&volume.id) {
        Some(attachment) => {
            same_options(volume, attachment, options)?;
            match attachment.phase {
                AttachmentPhase::Attaching => bring_up(context, volume).await,
                AttachmentPhase::Attached => match wait_until_serving(context, volume, false).await {
                    Ok(device) => Ok(device),
                    Err(fault) => Err(Fault { message: format!("{} is attached, but {}", name, fault.message), ..fault }),
                },
                AttachmentPhase::Detaching { .. } => {
                    let message = format!("volume {name} is being detached; try again when it is");
                    Err(Fault::new(Reason::VolumeNotReady, &name, message))
                }
            }
        }
        None => {
            let volume = ready(&state, &name)?;
            placement::check_targets(&state)?;
            end_tending(context, volume).await?;
            let Options { host, queue_depth, map } = options;
            let since_unix = unix_now();
            let phase = AttachmentPhase::Attaching;
            let record = AttachmentRecord { volume: volume.id, host, queue_depth, phase, since_unix, number: Attachment::NONE, map };
            context.apply(Mutation::PutAttachment(record)).await?;
            bring_up(context, volume).await
        }
    }
}

/// Until its lock, which the caller has, is released, no target sees to the replicas of a volume that isn't attached.
pub async fn end_tending(context: &Context, volume: &VolumeRecord) -> Result<(), Fault> {
    context.locks.leave_alone(&volume.name);
    wait_gone(context, volume.id).await
}

/// Goes on with an attachment that an earlier carrickd began.
pub async fn resume_attach(context: &Context, volume: &VolumeRecord) -> Result<(), Fault> {
    match context.state().attachments.get(&volume.id).map(|attachment| attachment.phase) {
        Some(AttachmentPhase::Attaching) => bring_up(context, volume).await.map(drop),
        _ => Ok(()),
    }
}

fn same_options(volume: &VolumeRecord, there: &AttachmentRecord, asked: Options) -> Result<(), Fault> {
    let name = &volume.name;
    let how = |host| if host { "for the host's own use" } else { "for a guest" };
    let message = if there.host != asked.host {
        format!("volume {name} is attached {}, not {}", how(there.host), how(asked.host))
    } else if there.queue_depth != asked.queue_depth {
        format!("volume {name} is attached with queue depth {}, not {}", there.queue_depth, asked.queue_depth)
    } else if there.map != asked.map {
        let how = |map| match map {
            Map::Auto => "mapped where this kernel needs it",
            Map::Always => "always mapped",
            Map::Never => "never mapped",
        };
        format!("volume {name} is attached to be {}, not {}", how(there.map), how(asked.map))
    } else {
        return Ok(());
    };
    Err(Fault::new(Reason::AttachedDifferently, name, format!("{message}: detach it first")))
}

/// Waits for the device and confirms the attachment, or takes it back.
async fn bring_up(context: &Context, volume: &VolumeRecord) -> Result<PathBuf, Fault> {
    match wait_until_serving(context, volume, true).await {
        Ok(device) => {
            set_phase(context, volume.id, AttachmentPhase::Attached, Some(device.display().to_string())).await?;
            tracing::info!(volume = %volume.name, device = %device.display(), "attached");
            Ok(device)
        }
        Err(fault) => {
            tracing::warn!(volume = %volume.name, error = %fault, "the attachment is taken back");
            let ended_by_itself = observed_process(context, volume.id).is_some_and(|process| process.pid().is_none());
            let why = Some(fault.message.clone());
            let undone = if ended_by_itself {
                remove_attachment(context, volume.id, why).await
            } else {
                set_phase(context, volume.id, AttachmentPhase::Detaching { force: false }, why).await?;
                take_device_away(context, volume, false, IfItFails::TryAgain).await
            };
            let message = match undone {
                Ok(()) => fault.message,
                Err(undo) => format!("{}; taking the attachment back isn't finished and goes on: {}", fault.message, undo.message),
            };
            Err(Fault { message, ..fault })
        }
    }
}

/// Waits until the device answers. `first`: if the target ends saying why, that is the answer.
async fn wait_until_serving(context: &Context, volume: &VolumeRecord, first: bool) -> Result<PathBuf, Fault> {
    let socket = context.run.target_control(volume.id);
    let mut changes = context.node.watch();
    let mut pause = POLL_MIN;
    let mut last = None;
    let deadline = Instant::now() + ATTACH_LIMIT;
    while Instant::now() < deadline {
        let process = observed_process(context, volume.id);
        if let (true, Some(Exit::Failed(error))) = (first, process.as_ref().and_then(|process| process.last_exit.as_ref())) {
            return Err(target_fault(volume, error));
        }
        if process.is_some_and(|process| process.answers())
            && let Ok(status) = control::target_status(&socket).await
        {
            match &status {
                TargetStatus { phase: TargetPhase::Serving, device: Some(device), .. } => return Ok(device.clone()),
                // It only tends the replicas: an earlier carrickd was killed just after it had started it, and it wasn't found in time.
                TargetStatus { phase: TargetPhase::Serving, device: None, .. } => {
                    launch::kill_what_runs(context, ProcessId::Target(volume.id)).await;
                }
                _ => last = Some(status),
            }
        }
        // A change of the process is seen at once, one inside it after a pause.
        let _ = tokio::time::timeout(pause, changes.changed()).await;
        pause = (pause * 2).min(POLL_MAX);
    }
    Err(timed_out(context, volume, last))
}

fn timed_out(context: &Context, volume: &VolumeRecord, last: Option<TargetStatus>) -> Fault {
    let what = match last {
        Some(TargetStatus { waiting_for: Some(text), .. }) => format!("it waits for {text}"),
        Some(TargetStatus { phase, .. }) => format!("it is still {}", phase_word(phase)),
        None => {
            let why = survey::why_silent(&context.node.observed(), ProcessId::Target(volume.id));
            format!("its process {}", why.unwrap_or_else(|| "doesn't answer".into()))
        }
    };
    let message = format!("volume {} has no device after {} s: {what}", volume.name, ATTACH_LIMIT.as_secs());
    Fault::new(Reason::AttachTimeout, &volume.name, message)
}

/// What a target does in a phase, in words.
pub fn phase_word(phase: TargetPhase) -> &'static str {
    match phase {
        TargetPhase::Electing => "connecting to its replicas",
        TargetPhase::Reconciling => "bringing its replicas to the same bytes",
        TargetPhase::Starting => "making the device",
        TargetPhase::Serving => "serving",
        TargetPhase::Stopping => "stopping",
    }
}

fn target_fault(volume: &VolumeRecord, error: &ControlError) -> Fault {
    let reason = match error.code {
        ControlErrorCode::Unsupported => Reason::Unsupported,
        ControlErrorCode::NoSpace => Reason::NoSpace,
        ControlErrorCode::Busy => Reason::DeviceBusy,
        ControlErrorCode::Conflict => Reason::VolumeNotReady,
        ControlErrorCode::Invalid | ControlErrorCode::NotFound | ControlErrorCode::Failed => Reason::TargetFailed,
    };
    Fault::new(reason, &volume.name, format!("volume {} can't be attached: {}", volume.name, error.message))
}

/// Detaches a volume. One that isn't attached stays so.
pub async fn detach(context: &Context, name: &str, force: bool) -> Result<(), Fault> {
    let name = parse_name(name)?;
    let _guard = context.locks.lock(&name).await;
    let state = context.state();
    let volume = state.volume_by_name(&name).ok_or_else(|| not_found(&name))?;
    if !state.attachments.contains_key(&volume.id) {
        return Ok(());
    }
    set_phase(context, volume.id, AttachmentPhase::Detaching { force }, None).await?;
    take_device_away(context, volume, force, IfItFails::StayAttached).await
}

/// Goes on with a detachment that an earlier carrickd began, or that failed.
pub async fn resume_detach(context: &Context, volume: &VolumeRecord) -> Result<(), Fault> {
    match context.state().attachments.get(&volume.id).map(|attachment| attachment.phase) {
        Some(AttachmentPhase::Detaching { force }) => {
            let taken = take_device_away(context, volume, force, IfItFails::TryAgain).await;
            if let Err(fault) = &taken {
                operations::waits(context, volume.id, |task| matches!(task, Task::Detach), fault).await?;
            }
            taken
        }
        _ => Ok(()),
    }
}

/// What becomes of the attachment if the device can't be taken away now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IfItFails {
    /// The operator is told; he may have another idea.
    StayAttached,
    /// Nobody waits for the answer: the loop goes on with it.
    TryAgain,
}

/// Steps 2 and 3 of a detachment; see the module.
async fn take_device_away(context: &Context, volume: &VolumeRecord, force: bool, if_it_fails: IfItFails) -> Result<(), Fault> {
    let id = ProcessId::Target(volume.id);
    let down = || observed_process(context, volume.id).filter(|process| process.pid().is_none());
    // An earlier try may have got this far.
    let ended = down().is_some_and(|process| process.last_exit == Some(Exit::Asked));
    if !ended && let Err(error) = ask_to_detach(context, volume, force).await {
        let failed = down().is_some_and(|process| matches!(process.last_exit, Some(Exit::Failed(_))));
        if force && failed {
            // Its device, if there is one, waits in the kernel for the next attachment.
            tracing::warn!(volume = %volume.name, %error, "no target can be started: the attachment is forgotten");
        } else {
            return Err(not_detached(context, volume, force, if_it_fails, error).await?);
        }
    }
    if let Some(pidfd) = context.node.pidfd(id) {
        launch::kill_unless_it_ends(id, &pidfd).await;
    }
    remove_attachment(context, volume.id, None).await?;
    tracing::info!(volume = %volume.name, "detached");
    Ok(())
}

/// Records what becomes of the attachment, and says why.
async fn not_detached(
    context: &Context,
    volume: &VolumeRecord,
    force: bool,
    if_it_fails: IfItFails,
    error: CallError,
) -> Result<Fault, Fault> {
    let name = &volume.name;
    if let CallError::Refused(refused) = &error
        && refused.code == ControlErrorCode::Busy
    {
        set_phase(context, volume.id, AttachmentPhase::Attached, Some(refused.message.clone())).await?;
        return Ok(Fault::new(Reason::DeviceBusy, name, refused.message.clone()));
    }
    if if_it_fails == IfItFails::StayAttached {
        let why = format!("its carrick-target {error}");
        set_phase(context, volume.id, AttachmentPhase::Attached, Some(why)).await?;
    }
    let hint = if force { String::new() } else { format!("; carrick detach --force {name} restarts a target that hangs") };
    let message = format!("volume {name} can't be detached: its carrick-target {error}{hint}");
    Ok(Fault::new(Reason::TargetUnreachable, name, message))
}

/// Returns when the target has answered that the device is gone. With `force`, a target that hangs is killed once: the
/// one that is started in its place takes the device over, and then away.
async fn ask_to_detach(context: &Context, volume: &VolumeRecord, force: bool) -> Result<(), CallError> {
    let id = ProcessId::Target(volume.id);
    let answered = match wait_until_answering(context, id).await {
        Ok(()) => send_detach(context, id, force).await,
        Err(error) => Err(error),
    };
    match answered {
        Err(CallError::TimedOut(_) | CallError::NotThere | CallError::Io(_) | CallError::Silent(_)) if force => {
            let before = context.node.pidfd(id);
            if let Some(pidfd) = before {
                tracing::warn!(volume = %volume.name, pid = pidfd.pid(), "the target hangs and is killed");
                launch::kill(context, id, &pidfd).await;
                let _ = tokio::time::timeout(GONE_LIMIT, context.node.wait_ended(id, pidfd.pid())).await;
            }
            wait_until_answering(context, id).await?;
            send_detach(context, id, true).await
        }
        other => other,
    }
}

/// Sends the request, and lets the loop know of it before and after: a target that ends before its answer was read must not
/// be started again.
async fn send_detach(context: &Context, id: ProcessId, force: bool) -> Result<(), CallError> {
    context.node.send(Event::EndAsked(id)).await;
    let answered = control::detach(&context.control_socket(id), force).await;
    context.node.send(Event::EndAnswered { process: id, granted: answered.is_ok() }).await;
    answered
}

async fn wait_until_answering(context: &Context, id: ProcessId) -> Result<(), CallError> {
    let answering = context.node.wait_until(|observed| observed.answers(id));
    match tokio::time::timeout(ANSWER_LIMIT, answering).await {
        Ok(()) => Ok(()),
        Err(_) => {
            let why = survey::why_silent(&context.node.observed(), id);
            Err(why.map_or(CallError::TimedOut(ANSWER_LIMIT), CallError::Silent))
        }
    }
}

/// `remark`: what the log is to say of it.
async fn set_phase(context: &Context, volume: VolumeId, phase: AttachmentPhase, remark: Option<String>) -> Result<(), Fault> {
    if let Some(record) = context.state().attachments.get(&volume) {
        context.apply_saying(remark, Mutation::PutAttachment(AttachmentRecord { phase, ..record.clone() })).await?;
    }
    Ok(())
}

/// Removes the record and waits until the loop has forgotten the process, so that a following attachment starts afresh.
async fn remove_attachment(context: &Context, volume: VolumeId, remark: Option<String>) -> Result<(), Fault> {
    if let Some(record) = context.state().volumes.get(&volume) {
        context.locks.leave_alone(&record.name);
    }
    context.apply_saying(remark, Mutation::RemoveAttachment(volume)).await?;
    wait_gone(context, volume).await
}

async fn wait_gone(context: &Context, volume: VolumeId) -> Result<(), Fault> {
    let id = ProcessId::Target(volume);
    tokio::time::timeout(GONE_LIMIT, context.node.wait_gone(id))
        .await
        .map_err(|_| Fault::new(Reason::TargetUnreachable, volume, format!("the {id} doesn't end")))
}

fn observed_process(context: &Context, volume: VolumeId) -> Option<Process> {
    context.node.observed().processes.get(&ProcessId::Target(volume)).cloned()
}
