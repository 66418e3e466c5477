//! Making a store, and opening its disk.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use carrick_backing_store::StoreError;
use carrick_backing_store::disk::{Access, PlaceOptions, RingDisk, StorePlace};
use carrick_backing_store::epoch_map::{self, FormatOptions};
use serde_json::json;

use super::{FormatArguments, print_json};

/// How long a store that is in use is waited for. The kernel keeps the disk of a killed process until its last I/O has ended; whoever
/// is started in its place shall not fail for that.
const IN_USE_LIMIT: Duration = Duration::from_secs(3);
/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_millis(5);

pub(crate) fn format(arguments: &FormatArguments) -> anyhow::Result<()> {
    let FormatArguments { store: path, size, prewrite, force } = arguments;
    let place = StorePlace::new(path);
    let mut disk = place.create(&PlaceOptions { size: *size, prewrite: *prewrite, force: *force })?;
    let store = epoch_map::format(&mut disk, path, &FormatOptions::default())?;
    // While we have the lock: nobody else makes another store in its place.
    place.publish()?;
    print_json(&json!({ "store": store }))
}

/// Opens the disk of a store for looking at it, also while it is served.
pub(crate) fn open_to_look(path: &Path) -> Result<RingDisk, StoreError> {
    StorePlace::new(path).open(Access::ReadOnly)
}

/// Opens the disk of a store for us alone.
pub(crate) fn open_exclusively(path: &Path) -> Result<RingDisk, StoreError> {
    let place = StorePlace::new(path);
    let until = Instant::now() + IN_USE_LIMIT;
    loop {
        match place.open(Access::Exclusive) {
            Err(StoreError::InUse(_) | StoreError::DeviceInUse(_)) if Instant::now() < until => thread::sleep(TRY_AGAIN),
            opened => return opened,
        }
    }
}
