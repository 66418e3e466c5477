//! The loop that makes the node what the records say: it takes events in, asks [`reconcile`] what to do, and does it.
//!
//! It alone changes [`Observed`]; everybody else sees copies. What takes time runs in tasks of its own, which report by
//! events; so the loop never waits for a process or a disk. Without events it sleeps.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, mpsc, watch};

use crate::context::{Context, unix_now};
use crate::observed::{Event, Observed, Process, ProcessId};
use crate::pidfd::PidFd;
use crate::reconcile::{Action, Work, reconcile};
use crate::{launch, lives, upgrade, volumes};

/// Events that wait for the loop at most. It takes microseconds for each; a sender would wait.
const EVENTS_MAX: usize = 1024;

/// How everybody else deals with the loop.
#[derive(Clone)]
pub struct NodeHandle {
    events: mpsc::Sender<Event>,
    changed: Arc<Notify>,
    observed: watch::Receiver<Arc<Observed>>,
    pidfds: Arc<Mutex<BTreeMap<ProcessId, Arc<PidFd>>>>,
}

/// What the loop itself needs.
pub struct NodeInbox {
    events: mpsc::Receiver<Event>,
    observed: watch::Sender<Arc<Observed>>,
}

/// Makes both ends. `changed` is what the loop wakes up for besides events.
pub fn channel(changed: Arc<Notify>) -> (NodeHandle, NodeInbox) {
    let (event_sender, event_receiver) = mpsc::channel(EVENTS_MAX);
    let (observed_sender, observed_receiver) = watch::channel(Arc::default());
    let handle = NodeHandle { events: event_sender, changed, observed: observed_receiver, pidfds: Arc::default() };
    (handle, NodeInbox { events: event_receiver, observed: observed_sender })
}

impl NodeHandle {
    /// The records changed.
    pub fn poke(&self) {
        self.changed.notify_one();
    }

    /// Something happened.
    pub async fn send(&self, event: Event) {
        // The loop ends only with the daemon.
        let _ = self.events.send(event).await;
    }

    /// As the loop last saw it.
    pub fn observed(&self) -> Arc<Observed> {
        Arc::clone(&self.observed.borrow())
    }

    /// Waits until the loop has seen what `condition` wants. The caller sets the time limit.
    pub async fn wait_until(&self, mut condition: impl FnMut(&Observed) -> bool) {
        let mut observed = self.observed.clone();
        // An error means that the daemon ends; so does the caller, soon.
        if observed.wait_for(|observed| condition(observed)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until a process of this number is gone, whether another one has its place or not.
    pub async fn wait_ended(&self, id: ProcessId, pid: u32) {
        self.wait_until(|observed| observed.processes.get(&id).and_then(Process::pid) != Some(pid)).await;
    }

    /// Waits until a process is gone and forgotten.
    pub async fn wait_gone(&self, id: ProcessId) {
        self.wait_until(|observed| !observed.processes.contains_key(&id)).await;
    }

    /// Waits for the next change of anything.
    pub fn watch(&self) -> watch::Receiver<Arc<Observed>> {
        self.observed.clone()
    }

    /// Remembers a process that runs.
    pub fn register(&self, id: ProcessId, pidfd: &Arc<PidFd>) {
        self.pidfds.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::clone(pidfd));
    }

    /// A process that runs, or did a moment ago.
    pub fn pidfd(&self, id: ProcessId) -> Option<Arc<PidFd>> {
        self.pidfds.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    fn forget(&self, id: ProcessId) {
        self.pidfds.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}

/// The loop. Ends never.
pub async fn run(context: Arc<Context>, mut inbox: NodeInbox) {
    let mut observed = Observed::default();
    for id in launch::leftovers(&context.run) {
        observed.on_event(Event::Found(id), Instant::now());
    }
    loop {
        // Records first: an operation holds its lock before it changes a record, so what is seen unfinished and unlocked is
        // nobody's.
        let state = context.state();
        (observed.busy, observed.alone) = (context.locks.busy(), context.locks.alone());
        let plan = reconcile(&state, &observed, context.moment());
        for action in &plan.actions {
            perform(&context, &mut observed, *action);
        }
        publish(&inbox.observed, &observed);
        // What is forgotten may be wanted again by now.
        if plan.actions.iter().any(|action| matches!(action, Action::Forget(_))) {
            continue;
        }
        wait(&context, &mut inbox.events, &mut observed, plan.wake_at).await;
    }
}

async fn wait(context: &Context, events: &mut mpsc::Receiver<Event>, observed: &mut Observed, wake_at: Option<Instant>) {
    let timer = async {
        match wake_at {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        event = events.recv() => match event {
            Some(event) => note(context, observed, event),
            // Impossible while the context holds a sender.
            None => std::future::pending().await,
        },
        () = context.node.changed.notified() => {}
        () = timer => {}
    }
    while let Ok(event) = events.try_recv() {
        note(context, observed, event);
    }
}

fn note(context: &Context, observed: &mut Observed, event: Event) {
    match &event {
        Event::Ended { process, exit } => tracing::info!(%process, %exit, "a process is gone"),
        Event::Hung(process) => tracing::warn!(%process, "a process runs but doesn't answer"),
        _ => tracing::debug!(?event, "event"),
    }
    let process = event.process();
    let before = process.and_then(|id| observed.processes.get(&id)).cloned();
    observed.on_event(event, Instant::now());
    if let Some((id, after)) = process.and_then(|id| Some((id, observed.processes.get(&id)?))) {
        context.note(lives::told(&context.state(), id, before.as_ref(), after, unix_now()));
    }
}

fn publish(sender: &watch::Sender<Arc<Observed>>, observed: &Observed) {
    sender.send_if_modified(|shown| {
        let changed = **shown != *observed;
        if changed {
            *shown = Arc::new(observed.clone());
        }
        changed
    });
}

fn perform(context: &Arc<Context>, observed: &mut Observed, action: Action) {
    tracing::debug!(?action, "action");
    match action {
        Action::Launch(id) => {
            observed.on_launch(id);
            tokio::spawn(launch::look_after(Arc::clone(context), id, launch::IfAbsent::Start));
        }
        Action::Look(id) => {
            observed.on_launch(id);
            tokio::spawn(launch::look_after(Arc::clone(context), id, launch::IfAbsent::Report));
        }
        Action::Stop(id) => {
            observed.on_stop(id);
            tokio::spawn(launch::stop(Arc::clone(context), id));
        }
        Action::Forget(id) => {
            observed.processes.remove(&id);
            context.node.forget(id);
            launch::clean_up(&context.run, id);
        }
        Action::Tell(id, health) => {
            observed.on_told(id, health);
            context.note(lives::judged(&context.state(), id, health, unix_now()).into_iter().collect());
        }
        Action::Upgrade => {
            observed.on_upgrade();
            let context = Arc::clone(context);
            tokio::spawn(async move {
                let waiting_for = upgrade::go_on(&context).await;
                context.node.send(Event::Upgraded { waiting_for }).await;
            });
        }
        Action::Work(volume, work) => {
            observed.on_work(volume);
            let context = Arc::clone(context);
            tokio::spawn(async move {
                let finished = volumes::resume(&context, volume, work).await;
                if !finished && !matches!(work, Work::Delete | Work::Move | Work::Operation | Work::Evict(_) | Work::Replace(_)) {
                    tracing::warn!(%volume, ?work, "unfinished work failed again");
                }
                context.node.send(Event::Worked { volume, finished }).await;
            });
        }
    }
}
