//! Data that changes on one replica's disk while nobody looks.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use carrick_backing_store::dice::Dice;

use super::nodes::{Nodes, VOLUME};
use crate::disk::Disk;
use crate::fio::Fio;
use crate::replicas::identical;
use crate::report::{Found, Plan};
use crate::site::Site;
use crate::store::program::check;

const BLOCK: u64 = 4096;
/// A request of fio's, which is repaired as a whole; at most one block of it is damaged.
const REQUEST: u64 = 64 << 10;
/// The beginning of a block that fio wrote (struct verify_header in its verify.h): magic number, kind, length, a seed, the offset.
const FIO_MAGIC: [u8; 2] = [0xca, 0xac];
const FIO_LENGTH: usize = 4;
const FIO_OFFSET: usize = 16;
/// One request in so many is damaged.
const EVERY: u64 = 4;
/// A replica is asked for a third of the reads, at random: no request stays unread for so many passes.
const PASSES_MAX: usize = 80;
/// What a read of what can't be had ends with.
const EIO: i32 = rustix::io::Errno::IO.raw_os_error();
/// What the store does after a load is done after this.
const SETTLED: Duration = Duration::from_secs(4);

pub fn silent(plan: &Plan) -> Found {
    let nodes = Nodes::new()?;
    let mib = if plan.quick { 16 } else { 64 };
    fio(&nodes, mib, &["--rw=write", "--do_verify=0"])?;
    sleep(SETTLED);
    let store = nodes.site.path("store0");
    let damaged = damage(&store.join("blocks"), plan)?;
    ensure!(damaged * EVERY >= mib * 16 / 2, "only {damaged} blocks were found to be damaged");
    let mut passes = 0;
    let mut repaired = 0;
    while repaired < damaged {
        ensure!(passes < PASSES_MAX, "after {passes} passes {repaired} of {damaged} damaged blocks are repaired");
        fio(&nodes, mib, &["--rw=read"]).with_context(|| nodes.site.log_tail())?;
        passes += 1;
        repaired = nodes.counted("repaired_reads")?;
    }
    fio(&nodes, mib, &["--rw=read"])?;
    let after = nodes.counted("repaired_reads")?;
    ensure!(after == damaged, "{after} reads were repaired, {damaged} blocks were damaged");
    nodes.site.detach(VOLUME)?;
    let bytes = identical(&nodes.site, VOLUME)?;
    nodes.site.carrick(&["shutdown"])?;
    let report = check(&store)?;
    Ok(format!(
        "{damaged} damaged blocks in {mib} MiB, {after} repaired in {passes} passes of fio verify, 0 seen; {bytes} bytes the same on all \
         replicas, check --data: 0 faults, {} blocks verified",
        report["verified"]
    ))
}

/// A pass through the first part of the volume.
fn fio(nodes: &Nodes, mib: u64, options: &[&str]) -> anyhow::Result<()> {
    let (size, request) = (format!("--size={mib}M"), format!("--bs={REQUEST}"));
    let verify = ["--iodepth=8", "--verify=crc32c", "--verify_interval=4096", "--verify_fatal=1", &size, &request];
    Fio::start(&nodes.device, &[&verify[..], options].concat())?.finish().map(drop)
}

/// Damages some of the blocks in a store's file, each in another way; how many.
fn damage(blocks: &Path, plan: &Plan) -> anyhow::Result<u64> {
    let file = File::options().read(true).write(true).open(blocks).with_context(|| format!("opening {}", blocks.display()))?;
    let mut requests: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for (offset, place) in find(&file)? {
        requests.entry(offset / REQUEST).or_default().push(place);
    }
    let mut dice = Dice::new(plan.seed);
    let mut damaged = 0;
    for (request, places) in requests.iter().filter(|(request, _)| *request % EVERY == 0) {
        let at = places[dice.index(places.len())];
        let mut block = [0; BLOCK as usize];
        file.read_exact_at(&mut block, at)?;
        match dice.below(4) {
            0 => block.fill_with(|| u8::try_from(dice.below(256)).unwrap_or_default()),
            1 => block.fill(0),
            2 => block[dice.index(block.len())] ^= 1 << dice.below(8),
            // A right block in the wrong place.
            _ => {
                let other = requests.get(&(request + 1)).and_then(|places| places.first()).copied();
                file.read_exact_at(&mut block, other.unwrap_or(at + BLOCK))?;
            }
        }
        file.write_all_at(&block, at)?;
        damaged += 1;
    }
    file.sync_all()?;
    Ok(damaged)
}

/// Where the blocks that fio wrote are in a store's file: the offset of each in the volume, and its place.
fn find(file: &File) -> anyhow::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut piece = vec![0; 1 << 20];
    for start in (0..file.metadata()?.len()).step_by(piece.len()) {
        let length = file.read_at(&mut piece, start)?;
        for (at, block) in (start..).step_by(BLOCK as usize).zip(piece[..length].chunks_exact(BLOCK as usize)) {
            let number =
                |from: usize, bytes: usize| block[from..from + bytes].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            if block[..2] == FIO_MAGIC && number(FIO_LENGTH, 4) == BLOCK {
                found.push((number(FIO_OFFSET, 8), at));
            }
        }
    }
    Ok(found)
}

/// Fills the block at this offset of the volume with zeros, wherever it is in these stores; in how many places.
fn zero(site: &Site, stores: &[&str], offset: u64) -> anyhow::Result<usize> {
    let mut places = 0;
    for store in stores {
        let file = File::options().read(true).write(true).open(site.path(store).join("blocks"))?;
        for (_, place) in find(&file)?.into_iter().filter(|(found, _)| *found == offset) {
            file.write_all_at(&[0; BLOCK as usize], place)?;
            places += 1;
        }
        file.sync_all()?;
    }
    Ok(places)
}

/// After so many reads each of two replicas was read first.
const PROBED_WITHIN: usize = 2 * 257;

/// Damage in all copies of a block, and in one of two.
pub fn every_copy(_: &Plan) -> Found {
    const ALL: u64 = 17 * BLOCK;
    const ONE: u64 = 300 * BLOCK;
    let site = Site::with_stores(2)?;
    site.carrick(&["volume", "create", "vm1", "--size", "64M", "--replicas", "2"])?;
    let device = site.attach("vm1", &[])?;
    let write = |size: &str, offset: &str| {
        let options = ["--rw=write", "--do_verify=0", "--verify=crc32c", "--verify_interval=4096", "--bs=64k", size, offset];
        Fio::start(&device, &options)?.finish().map(drop)
    };
    write("--size=4M", "--offset=0")?;
    sleep(SETTLED);
    let both = zero(&site, &["store0", "store1"], ALL)?;
    let one = zero(&site, &["store0"], ONE)?;
    ensure!((both, one) == (2, 1), "block {ALL} was found {both} times in two stores, block {ONE} {one} times in one");
    let disk = Disk::open(&device)?;
    for _ in 0..16 {
        let error = disk.read_block(ALL / BLOCK).err().context("a block that is damaged everywhere was read without an error")?;
        ensure!(error.raw_os_error() == Some(EIO), "reading a block that is damaged everywhere: {error}");
        let healed = disk.read_block(ONE / BLOCK).context("reading a block that is damaged in one copy")?;
        ensure!(healed[..2] == FIO_MAGIC, "a block that is damaged in one copy was read wrong");
        let beside = disk.read_block(ALL / BLOCK + 1).context("reading beside a damaged block")?;
        ensure!(beside[..2] == FIO_MAGIC, "beside a damaged block something wrong was read");
    }
    // Each replica is read first now and then, however slow it seemed.
    (0..PROBED_WITHIN).try_for_each(|_| disk.read_block(ONE / BLOCK).map(drop))?;
    let repaired = site.carrick(&["volume", "show", "vm1"])?["attachment"]["repaired_reads"].as_u64();
    ensure!(repaired == Some(1), "{repaired:?} reads were repaired, one block was damaged in one copy");
    write("--size=64k", "--offset=64k")?;
    ensure!(disk.read_block(ALL / BLOCK)?[..2] == FIO_MAGIC, "what was written over a damaged block was read wrong");
    drop(disk);
    site.detach("vm1")?;
    let bytes = identical(&site, "vm1")?;
    site.carrick(&["shutdown"])?;
    for store in ["store0", "store1"] {
        check(&site.path(store))?;
    }
    Ok(format!(
        "damaged in both copies: an I/O error each of 16 times, until it was overwritten; in one of two: read right, repaired once; \
         {bytes} bytes the same on both, check --data: 0 faults"
    ))
}
