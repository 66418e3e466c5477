//! [`Slots`]: things that are known by a small number while they are there.

/// Things with a number each, which is used again when they are gone.
#[derive(Debug)]
pub(super) struct Slots<T> {
    slots: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Slots<T> {
    pub(super) const fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }

    /// Puts a thing in, and says its number.
    pub(super) fn insert(&mut self, thing: T) -> usize {
        if let Some(index) = self.free.pop() {
            self.slots[index] = Some(thing);
            return index;
        }
        self.slots.push(Some(thing));
        self.slots.len() - 1
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.slots.get_mut(index)?.as_mut()
    }

    pub(super) fn remove(&mut self, index: usize) -> Option<T> {
        let thing = self.slots.get_mut(index)?.take()?;
        self.free.push(index);
        Some(thing)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}
