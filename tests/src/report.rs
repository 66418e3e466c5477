//! Runs items one after the other and prints what each found.

use std::process::ExitCode;
use std::time::Instant;

/// How thoroughly to try.
pub struct Plan {
    /// Fewer kills, seeds and seconds.
    pub quick: bool,
    /// Seed of what is random.
    pub seed: u64,
}

/// What an item measured or saw, in words, when it passes.
pub type Found = anyhow::Result<String>;

/// One promise and how it is tried.
pub struct Item {
    /// Short, for `--only`.
    pub name: &'static str,
    /// What must hold, with its bound.
    pub promise: &'static str,
    /// Tries it.
    pub run: fn(&Plan) -> Found,
}

/// Exit code if no item has that name: `tests/acceptance` may have another list with it.
const NOTHING: u8 = 4;

/// Runs the items whose name contains `only`.
pub fn run(items: &[Item], plan: &Plan, only: &str) -> ExitCode {
    let (mut passed, mut failed) = (0, 0);
    for item in items.iter().filter(|item| item.name.contains(only)) {
        let begin = Instant::now();
        let result = (item.run)(plan);
        let seconds = begin.elapsed().as_secs_f32();
        match result {
            Ok(found) => {
                passed += 1;
                println!("pass  {:<16} {} — {found} ({seconds:.0} s)", item.name, item.promise);
            }
            Err(error) => {
                failed += 1;
                println!("FAIL  {:<16} {} — {error:#} ({seconds:.0} s)", item.name, item.promise);
            }
        }
    }
    if passed + failed > 0 {
        println!("{passed} passed, {failed} failed");
    }
    match (passed, failed) {
        (0, 0) => ExitCode::from(NOTHING),
        (_, 0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
