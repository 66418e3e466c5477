//! What the interface of the last release promised to callers still holds: names, numbers and types of all that it had. New things
//! may be added; what is taken away leaves its number and its name reserved.
//!
//! At a release, `CARRICK_RELEASE=1 cargo test -p carrick-ctl --test proto` writes down what that one promises.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that finds no value has found a failure")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use carrick_ctl::v1;
use prost::Message;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};

const PACKAGE: &str = "carrick.v1";

/// What callers may rely on: a thing of the interface, and how it is.
#[derive(Default)]
struct Promises {
    kept: BTreeMap<String, String>,
    /// Things that are gone, and can't come back as something else.
    reserved: BTreeSet<String>,
}

impl Promises {
    fn of(set: &FileDescriptorSet) -> Self {
        let mut promises = Self::default();
        for file in set.file.iter().filter(|file| file.package() == PACKAGE) {
            file.message_type.iter().for_each(|message| promises.message(message));
            file.enum_type.iter().for_each(|words| promises.words(words));
            for service in &file.service {
                for method in &service.method {
                    let streams =
                        [method.client_streaming(), method.server_streaming()].map(|streams| if streams { "stream " } else { "" });
                    let how = format!("{}{} -> {}{}", streams[0], method.input_type(), streams[1], method.output_type());
                    promises.kept.insert(format!("rpc {}.{}", service.name(), method.name()), how);
                }
            }
        }
        promises
    }

    fn message(&mut self, message: &DescriptorProto) {
        assert!(message.nested_type.is_empty() && message.enum_type.is_empty(), "{}: nested types are not compared", message.name());
        let numbered = |number: i32| format!("field {} {number:05}", message.name());
        for field in &message.field {
            let presence = if field.proto3_optional() { "optional " } else { "" };
            let kind = format!("{presence}{:?} {:?} {}", field.label(), field.r#type(), field.type_name());
            self.kept.insert(numbered(field.number()), format!("{} {}", field.name(), kind.trim_end()));
        }
        for range in &message.reserved_range {
            self.reserved.extend((range.start()..range.end()).map(numbered));
        }
    }

    fn words(&mut self, words: &EnumDescriptorProto) {
        let numbered = |number: i32| format!("value {} {number:05}", words.name());
        self.kept.extend(words.value.iter().map(|value| (numbered(value.number()), value.name().to_owned())));
        for range in &words.reserved_range {
            // Unlike those of messages, these include their end (google/protobuf/descriptor.proto).
            self.reserved.extend((range.start()..=range.end()).map(numbered));
        }
    }

    /// What of an older interface doesn't hold in this one.
    fn broken(&self, before: &BTreeMap<String, String>) -> Vec<String> {
        let is_broken = |(thing, how): &(&String, &String)| match self.kept.get(*thing) {
            Some(now) => now != *how,
            None => !self.reserved.contains(*thing),
        };
        let now = |thing: &String| self.kept.get(thing).map_or("gone, and not reserved", String::as_str);
        before.iter().filter(is_broken).map(|(thing, how)| format!("{thing}: was {how}, is {}", now(thing))).collect()
    }
}

fn read(text: &str) -> BTreeMap<String, String> {
    text.lines().filter_map(|line| line.split_once(": ")).map(|(thing, how)| (thing.to_owned(), how.to_owned())).collect()
}

#[test]
fn what_the_last_release_promised_holds() {
    let now = Promises::of(&FileDescriptorSet::decode(v1::DESCRIPTORS).unwrap());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/carrick-v1.txt");
    if std::env::var_os("CARRICK_RELEASE").is_some() {
        let mut text = String::new();
        now.kept.iter().for_each(|(thing, how)| writeln!(text, "{thing}: {how}").unwrap());
        std::fs::write(&path, text).unwrap();
    }
    let before = read(&std::fs::read_to_string(&path).unwrap());
    assert!(before.len() > 100, "the fixture has only {} lines", before.len());
    assert_eq!(now.broken(&before), Vec::<String>::new());
}

#[test]
fn what_would_break_callers_is_found() {
    let before = Promises::of(&FileDescriptorSet::decode(v1::DESCRIPTORS).unwrap()).kept;
    type Change = fn(&mut FileDescriptorSet);
    fn message<'a>(set: &'a mut FileDescriptorSet, name: &str) -> &'a mut DescriptorProto {
        set.file.iter_mut().flat_map(|file| &mut file.message_type).find(|message| message.name() == name).unwrap()
    }
    let changes: [(usize, Change); 6] = [
        (0, |_| {}),
        // A renamed field breaks JSON, another type breaks the wire, a missing one both.
        (1, |set| message(set, "Volume").field[0].name = Some("other".into())),
        (1, |set| message(set, "Volume").field[0].set_type(prost_types::field_descriptor_proto::Type::Uint64)),
        (1, |set| _ = message(set, "Volume").field.remove(0)),
        (0, |set| {
            let volume = message(set, "Volume");
            let number = volume.field.remove(0).number;
            let range = prost_types::descriptor_proto::ReservedRange { start: number, end: number.map(|number| number + 1) };
            volume.reserved_range.push(range);
        }),
        (1, |set| {
            let mut methods = set.file.iter_mut().flat_map(|file| &mut file.service).flat_map(|service| &mut service.method);
            let method = methods.next().unwrap();
            method.server_streaming = Some(!method.server_streaming());
        }),
    ];
    for (index, (broken, change)) in changes.into_iter().enumerate() {
        let mut set = FileDescriptorSet::decode(v1::DESCRIPTORS).unwrap();
        // Not those of other packages that it imports.
        set.file.retain(|file| file.package() == PACKAGE);
        change(&mut set);
        assert_eq!(Promises::of(&set).broken(&before).len(), broken, "change {index}");
    }
}
