//! Asks `carrickd` which replicas count, on a thread of its own: it may take its time, and the queue thread must not wait.

use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use carrick_backing_store::StoreId;
use carrick_replicator::control::{RecordsAnswer, RecordsRequest, TargetConfig, VolumeConfig, call};
use carrick_replicator::engine::{ConfigRecord, ConfigRequest, MemberIndex};
use carrick_replicator::io::Sender;

use crate::front::Order;

/// How long an answer may take: a change is on stable media before it is answered.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Requests that wait for the thread: the engine has one under way at a time.
const QUEUE: usize = 4;
const STACK: usize = 256 << 10;

/// Starts the thread. What is sent there is asked, and answered by an [`Order::Config`].
///
/// # Errors
/// When no thread can be had.
pub fn spawn(config: &TargetConfig, socket: &Path, orders: Sender<Order>) -> std::io::Result<mpsc::SyncSender<ConfigRequest>> {
    let (questions, asked) = mpsc::sync_channel::<ConfigRequest>(QUEUE);
    let (volume, socket) = (config.volume, socket.to_owned());
    let stores: Vec<StoreId> = config.replicas.iter().map(|replica| replica.store).collect();
    let ask = move || {
        for question in asked {
            let request = match question {
                ConfigRequest::Read => RecordsRequest::Read { volume },
                ConfigRequest::Swap(next) => RecordsRequest::Swap { volume, next: named(&next, &stores) },
            };
            let answer = match call::<_, RecordsAnswer>(&socket, &request, ANSWER_LIMIT) {
                Ok(RecordsAnswer::Config(config)) => numbered(&config, &stores),
                Ok(RecordsAnswer::Refused(error)) => Err(error.to_string()),
                Err(error) => Err(format!("carrickd doesn't answer on {}: {error}", socket.display())),
            };
            if !orders.send(Order::Config(answer)) {
                return;
            }
        }
    };
    thread::Builder::new().name("records".into()).stack_size(STACK).spawn(ask)?;
    Ok(questions)
}

fn named(record: &ConfigRecord, stores: &[StoreId]) -> VolumeConfig {
    let members = record.members.iter().filter_map(|index| stores.get(index.0).copied()).collect();
    VolumeConfig { version: record.version, members, term: record.term, attachment: record.attachment }
}

fn numbered(config: &VolumeConfig, stores: &[StoreId]) -> Result<ConfigRecord, String> {
    let index = |member: &StoreId| {
        let found = stores.iter().position(|store| store == member).map(MemberIndex);
        found.ok_or_else(|| format!("a replica in store {member} counts, which this target was not told of: attach the volume again"))
    };
    let members = config.members.iter().map(index).collect::<Result<_, _>>()?;
    Ok(ConfigRecord { version: config.version, members, term: config.term, attachment: config.attachment })
}

#[cfg(test)]
mod tests {
    use carrick_backing_store::Term;
    use carrick_replicator::engine::{Attachment, ConfigVersion};

    use super::*;

    #[test]
    fn stores_become_numbers_and_numbers_stores() {
        let stores: Vec<StoreId> = (1..4).map(|number| StoreId::from_bytes([number; 16])).collect();
        let members = vec![stores[0], stores[2]];
        let config = VolumeConfig { version: ConfigVersion::new(7), members, term: Term::new(9), attachment: Attachment::new(3) };
        let record = numbered(&config, &stores).unwrap();
        assert_eq!(record.members.iter().collect::<Vec<_>>(), [MemberIndex(0), MemberIndex(2)]);
        assert_eq!(named(&record, &stores), config);
        assert!(numbered(&config, &stores[..2]).unwrap_err().contains("attach the volume again"));
    }
}
