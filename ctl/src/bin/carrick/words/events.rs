//! What happened, for people.

use std::mem::MaybeUninit;

use carrick_ctl::v1::Event;

/// Lines of events.
pub fn events(events: &[Event]) -> String {
    if events.is_empty() { "no events\n".into() } else { events.iter().map(event_line).collect() }
}

/// One event.
pub fn event_line(event: &Event) -> String {
    line(event, local_time)
}

fn line(event: &Event, time: impl Fn(u64) -> String) -> String {
    let what = match (&event.volume, &event.store) {
        (Some(volume), _) => format!("volume {volume}"),
        (None, Some(store)) => format!("store {store}"),
        (None, None) => "node".into(),
    };
    let often = match event.times {
        0 | 1 => String::new(),
        times => format!(" ({times} times since {})", time(event.first_unix)),
    };
    // A process may say more than a line.
    let text = event.text.replace(['\n', '\r'], " ");
    format!("{}  {what}: {text}{often}\n", time(event.time_unix))
}

/// `2026-01-31 23:59:59`, where this machine is; seconds since 1970 if that can't be told.
fn local_time(unix: u64) -> String {
    let mut parts = MaybeUninit::<libc::tm>::uninit();
    let time = libc::time_t::try_from(unix).unwrap_or(libc::time_t::MAX);
    // SAFETY: both pointers are valid for the call; it writes all of `parts` unless it returns null.
    let told = unsafe { libc::localtime_r(&raw const time, parts.as_mut_ptr()) };
    if told.is_null() {
        return unix.to_string();
    }
    // SAFETY: it was written, see above.
    let libc::tm { tm_year, tm_mon, tm_mday, tm_hour, tm_min, tm_sec, .. } = unsafe { parts.assume_init() };
    format!("{}-{:02}-{tm_mday:02} {tm_hour:02}:{tm_min:02}:{tm_sec:02}", i64::from(tm_year) + 1900, tm_mon + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line() {
        let event = Event {
            time_unix: 9,
            first_unix: 7,
            times: 3,
            volume: Some("vm1".into()),
            store: Some("/srv/a".into()),
            text: "its carrick-target was\nkilled".into(),
            ..Event::default()
        };
        assert_eq!(line(&event, |unix| unix.to_string()), "9  volume vm1: its carrick-target was killed (3 times since 7)\n");
        let once = Event { times: 1, volume: None, ..event };
        assert_eq!(line(&once, |unix| unix.to_string()), "9  store /srv/a: its carrick-target was killed\n");
        let of_node = Event { store: None, text: "carrickd 1 serves".into(), ..once };
        assert_eq!(line(&of_node, |unix| unix.to_string()), "9  node: carrickd 1 serves\n");
        assert_eq!(events(&[]), "no events\n");
    }

    #[test]
    fn times_are_dates_and_the_end_of_time_is_a_number() {
        let text = local_time(1_700_000_000);
        assert!(text.starts_with("2023-11-1") && text.len() == "2023-11-14 22:13:20".len(), "{text}");
        assert_eq!(local_time(u64::MAX), u64::MAX.to_string());
    }
}
