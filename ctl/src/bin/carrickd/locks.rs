//! One operation at a time for each volume, by its name; operations on different volumes don't wait for each other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use carrick_ctl::name::VolumeName;
use tokio::sync::{Notify, OwnedMutexGuard};

type Held = Arc<Mutex<BTreeMap<VolumeName, Arc<tokio::sync::Mutex<()>>>>>;

/// The locks of all volumes that somebody works on.
#[derive(Clone)]
pub struct Locks {
    held: Held,
    alone: Arc<Mutex<BTreeSet<VolumeName>>>,
    released: Arc<Notify>,
}

/// A volume's lock, held.
pub struct Guard {
    name: VolumeName,
    // `None` only while dropping.
    lock: Option<OwnedMutexGuard<()>>,
    locks: Locks,
}

impl Locks {
    /// None held. `released` is notified whenever one is given back.
    pub fn new(released: Arc<Notify>) -> Self {
        Self { held: Held::default(), alone: Arc::default(), released }
    }

    /// Waits until nobody else works on the volume.
    pub async fn lock(&self, name: &VolumeName) -> Guard {
        let lock = self.entry(name).lock_owned().await;
        Guard { name: name.clone(), lock: Some(lock), locks: self.clone() }
    }

    /// The lock, if nobody has it.
    pub fn try_lock(&self, name: &VolumeName) -> Option<Guard> {
        let lock = self.entry(name).try_lock_owned().ok()?;
        Some(Guard { name: name.clone(), lock: Some(lock), locks: self.clone() })
    }

    /// The volumes that somebody works on.
    pub fn busy(&self) -> BTreeSet<VolumeName> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Until the lock of this volume, which the caller has, is released, no target tends the volume.
    pub fn leave_alone(&self, name: &VolumeName) {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        self.released.notify_one();
    }

    /// The volumes that are not to be tended.
    pub fn alone(&self) -> BTreeSet<VolumeName> {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn entry(&self, name: &VolumeName) -> Arc<tokio::sync::Mutex<()>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(held.entry(name.clone()).or_default())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.locks.alone.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
        drop(self.lock.take());
        {
            let mut held = self.locks.held.lock().unwrap_or_else(PoisonError::into_inner);
            // Those who wait have a reference of their own, taken under `held`: with one left nobody waits.
            if held.get(&self.name).is_some_and(|lock| Arc::strong_count(lock) == 1) {
                held.remove(&self.name);
            }
        }
        self.locks.released.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time_for_each_name_and_nothing_is_left() {
        let locks = Locks::new(Arc::new(Notify::new()));
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let held = locks.lock(&a).await;
        assert!(locks.try_lock(&a).is_none());
        assert!(locks.try_lock(&b).is_some());
        let waiting = tokio::spawn({
            let (locks, a) = (locks.clone(), a.clone());
            async move { drop(locks.lock(&a).await) }
        });
        tokio::task::yield_now().await;
        locks.leave_alone(&a);
        assert!(locks.alone().contains(&a));
        drop(held);
        assert!(locks.alone().is_empty());
        waiting.await.unwrap();
        assert!(locks.busy().is_empty());
        locks.released.notified().await;
    }
}
