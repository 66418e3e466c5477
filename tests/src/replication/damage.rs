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
use crate::fio::Fio;
use crate::replicas::identical;
use crate::report::{Found, Plan};
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
    let requests = find(&file)?;
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

/// Where the blocks of each of fio's requests are in a store's file.
fn find(file: &File) -> anyhow::Result<BTreeMap<u64, Vec<u64>>> {
    let mut requests: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let mut piece = vec![0; 1 << 20];
    for start in (0..file.metadata()?.len()).step_by(piece.len()) {
        let length = file.read_at(&mut piece, start)?;
        for (at, block) in (start..).step_by(BLOCK as usize).zip(piece[..length].chunks_exact(BLOCK as usize)) {
            let number =
                |from: usize, bytes: usize| block[from..from + bytes].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            if block[..2] == FIO_MAGIC && number(FIO_LENGTH, 4) == BLOCK {
                requests.entry(number(FIO_OFFSET, 8) / REQUEST).or_default().push(at);
            }
        }
    }
    Ok(requests)
}
