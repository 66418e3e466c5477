//! Block-aligned memory that is reused: data is copied in once and then shared by reference until every replica has it.
//!
//! A pool and its buffers belong to one thread: nothing is locked, and once as many buffers exist as are used at a time, nothing is
//! allocated either.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::rc::Rc;
use std::slice;

use crate::units::BLOCK_SIZE;

/// Capacities are powers of two from one block up to this, in bytes: 1 MiB of data that begins and ends inside blocks
/// touches 257 of them.
const CAPACITY_MAX: usize = 2 << 20;
const CLASSES: usize = (CAPACITY_MAX / BLOCK_SIZE as usize).ilog2() as usize + 1;

/// One aligned allocation.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    capacity: usize,
}

impl Memory {
    fn layout(capacity: usize) -> Layout {
        // Capacities are powers of two of at least a block, so the layout is always valid; the fallback keeps it total.
        Layout::from_size_align(capacity, BLOCK_SIZE as usize).unwrap_or(Layout::new::<[u8; 4096]>())
    }

    fn new(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Self { start, capacity: layout.size() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and dropped once.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
    }
}

#[derive(Debug)]
struct Shelves {
    free: [Vec<Rc<Memory>>; CLASSES],
    kept: usize,
    keep_max: usize,
}

/// A pool of aligned buffers. It keeps at most a given number of free bytes; more go back to the allocator at once.
#[derive(Clone, Debug)]
pub struct BufferPool {
    shelves: Rc<RefCell<Shelves>>,
}

impl BufferPool {
    /// A pool that keeps up to `keep_max` bytes of free memory.
    #[must_use]
    pub fn new(keep_max: usize) -> Self {
        Self { shelves: Rc::new(RefCell::new(Shelves { free: Default::default(), kept: 0, keep_max })) }
    }

    fn class(length: usize) -> usize {
        let capacity = length.max(BLOCK_SIZE as usize).next_power_of_two();
        (capacity / BLOCK_SIZE as usize).ilog2() as usize
    }

    /// A buffer of `length` bytes with unspecified (but initialised) content.
    ///
    /// # Panics
    /// If `length` is over 2 MiB: callers check foreign lengths first.
    #[must_use]
    pub fn take(&self, length: usize) -> Buffer {
        assert!(length <= CAPACITY_MAX, "a buffer of {length} bytes was asked for, {CAPACITY_MAX} is the limit");
        let class = Self::class(length);
        let mut shelves = self.shelves.borrow_mut();
        let reused = shelves.free[class].pop();
        if let Some(memory) = &reused {
            shelves.kept -= memory.capacity;
        }
        let memory = reused.unwrap_or_else(|| Rc::new(Memory::new((BLOCK_SIZE as usize) << class)));
        Buffer { held: Held { memory: Some(memory), pool: self.clone() }, length }
    }

    /// Gives all free memory back to the allocator, for a process that has become idle.
    pub fn trim(&self) {
        let mut shelves = self.shelves.borrow_mut();
        shelves.free = Default::default();
        shelves.kept = 0;
    }

    fn put(&self, memory: Rc<Memory>) {
        let mut shelves = self.shelves.borrow_mut();
        if shelves.kept + memory.capacity <= shelves.keep_max {
            shelves.kept += memory.capacity;
            let class = Self::class(memory.capacity);
            shelves.free[class].push(memory);
        }
    }
}

/// Memory that goes back to its pool with its last user.
#[derive(Clone, Debug)]
struct Held {
    memory: Option<Rc<Memory>>,
    pool: BufferPool,
}

impl Held {
    fn start(&self) -> NonNull<u8> {
        // Without memory no byte is ever looked at.
        self.memory.as_ref().map_or(NonNull::dangling(), |memory| memory.start)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take().filter(|memory| Rc::strong_count(memory) == 1) {
            self.pool.put(memory);
        }
    }
}

/// A block-aligned buffer with one owner, who may write to it.
#[derive(Debug)]
pub struct Buffer {
    held: Held,
    length: usize,
}

impl Buffer {
    /// Ends writing, begins sharing.
    #[must_use]
    pub fn share(self) -> SharedBuffer {
        SharedBuffer { held: self.held, range: 0..self.length }
    }

    /// Shortens it.
    ///
    /// # Panics
    /// If `length` is longer than the buffer.
    pub fn truncate(&mut self, length: usize) {
        assert!(length <= self.length, "truncate makes a buffer shorter");
        self.length = length;
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `length <= capacity` initialised bytes, owned by this buffer alone until it is shared.
        unsafe { slice::from_raw_parts(self.held.start().as_ptr(), self.length) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access unique.
        unsafe { slice::from_raw_parts_mut(self.held.start().as_ptr(), self.length) }
    }
}

/// A read-only view of a buffer that is cheap to clone.
#[derive(Clone, Debug)]
pub struct SharedBuffer {
    held: Held,
    range: Range<usize>,
}

impl SharedBuffer {
    /// A part of this view.
    ///
    /// # Panics
    /// If the part reaches outside the view.
    #[must_use]
    pub fn slice(&self, part: Range<usize>) -> Self {
        assert!(part.start <= part.end && part.end <= self.range.len(), "part {part:?} of a view of {} bytes", self.range.len());
        Self { held: self.held.clone(), range: self.range.start + part.start..self.range.start + part.end }
    }
}

impl Deref for SharedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range was within the buffer that was shared, which nobody writes to any more.
        unsafe { slice::from_raw_parts(self.held.start().as_ptr().add(self.range.start), self.range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_reused_and_bounded() {
        let pool = BufferPool::new(8192);
        let first = pool.take(5000);
        assert_eq!((first.len(), first.as_ptr() as usize % 4096), (5000, 0));
        let place = first.as_ptr();
        drop(first);
        let again = pool.take(8192);
        assert_eq!(again.as_ptr(), place);
        let other = pool.take(4096);
        drop(again);
        drop(other);
        assert_eq!(pool.shelves.borrow().kept, 8192, "the second one is over the bound and goes back to the allocator");
        pool.trim();
        assert_eq!(pool.shelves.borrow().kept, 0);
    }

    #[test]
    fn views_share_memory_until_the_last_is_gone() {
        let pool = BufferPool::new(1 << 20);
        let mut buffer = pool.take(4096);
        buffer[100] = 9;
        let shared = buffer.share();
        let part = shared.slice(100..200).slice(0..1);
        drop(shared);
        assert_eq!(&*part, &[9]);
        assert_eq!(pool.shelves.borrow().kept, 0);
        drop(part);
        assert_eq!(pool.shelves.borrow().kept, 4096);
    }
}
