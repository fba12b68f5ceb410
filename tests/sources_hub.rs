//! Cartridges from a stand-in of the Hugging Face hub: what is chosen, what is checked, and what is told.

mod stand_in;

use std::time::{Duration, Instant};

use cartouche::cartridge::{CartridgeError, FileSource, Source};
use stand_in::{
    Answer, Trouble,
    hub::{Hub, sha256},
    store_support::{
        MAX_BYTES, cartridge, hub_source, hub_source_within, read, safetensors_bytes, store, times,
        torch_bytes,
    },
};

const ID: &str = "acme/notes";

fn reason(error: &CartridgeError) -> String {
    match error {
        CartridgeError::SourceUnavailable { id, from: Source::Huggingface, reason } => {
            assert_eq!(id, ID);
            reason.clone()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_cartridge_comes_with_its_config_from_one_commit() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let config = b"model: {pretrained_model_name_or_path: acme/model}\n";
    let commit = hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0)), ("config.yaml", config)]);
    let source = hub_source(&hub, dir.path(), None);
    assert_eq!(source.stamp(ID).unwrap(), None);
    source.fetch(ID).unwrap();
    let got = read(&source, ID).unwrap();
    assert_eq!(got.generation(), cartridge(1.0).generation());
    assert_eq!(got.provenance().model.as_deref(), Some("acme/model"));
    assert_eq!(source.list(), [ID]);
    let record = source.record(ID).unwrap().unwrap();
    assert_eq!(record.revision.as_deref(), Some(commit.as_str()));
    assert_eq!(record.digest, sha256(&torch_bytes(1.0)));
    assert!(hub.api.asked_for("/resolve/").iter().all(|asked| asked.path.contains(&commit)));
}

/// A repository without config.yaml, with several .pt files, or with them in folders.
#[test]
fn the_file_of_a_repository_is_chosen_by_rule() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let (one, two) = (torch_bytes(1.0), torch_bytes(2.0));
    let st = safetensors_bytes(2.0);
    hub.commit("a/named", &[("b.pt", &one), ("cartridge.pt", &two)]);
    hub.commit("a/steps", &[("cache-step9.pt", &one), ("cache-step10.pt", &two)]);
    hub.commit("a/sole", &[("any.pt", &two), ("README.md", b"x")]);
    hub.commit("a/safe", &[("cartridge.safetensors", &st), ("other.pt", &one)]);
    hub.commit("a/below", &[("run/cache-step1.pt", &two)]);
    let source = hub_source(&hub, dir.path(), None);
    for id in ["a/named", "a/steps", "a/sole", "a/safe", "a/below"] {
        source.fetch(id).unwrap();
        assert_eq!(read(&source, id).unwrap().generation(), cartridge(2.0).generation(), "{id}");
    }
    hub.commit("a/many", &[("b.pt", &one), ("c.pt", &two)]);
    hub.commit("a/none", &[("README.md", b"x")]);
    for (id, says) in [("a/many", "2 files may be"), ("a/none", "has no cartridge.pt")] {
        let error = source.fetch(id).unwrap_err();
        assert!(
            matches!(&error, CartridgeError::NotFound { hint, .. } if hint.contains(says)
            && hint.starts_with("Could not access HuggingFace repository")),
            "{error}"
        );
    }
    source.fetch("a/many/c.pt").unwrap();
    assert_eq!(read(&source, "a/many/c.pt").unwrap().generation(), cartridge(2.0).generation());
}

#[test]
fn revisions_are_ids_of_their_own() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let old = hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(2.0))]);
    let source = hub_source(&hub, dir.path(), None);
    let pinned = format!("{ID}@{old}");
    source.fetch(ID).unwrap();
    source.fetch(&pinned).unwrap();
    assert_eq!(read(&source, ID).unwrap().generation(), cartridge(2.0).generation());
    assert_eq!(read(&source, &pinned).unwrap().generation(), cartridge(1.0).generation());
    let error = source.fetch(&format!("{ID}@nothing")).unwrap_err();
    assert!(error.to_string().contains("RevisionNotFound"), "{error}");
}

#[test]
fn content_that_is_there_already_is_not_sent_again() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    hub.commit("acme/copy", &[("other-name.pt", &torch_bytes(1.0))]);
    let source = hub_source(&hub, dir.path(), None);
    source.fetch(ID).unwrap();
    let stamp = source.stamp(ID).unwrap();
    source.fetch(ID).unwrap();
    source.fetch("acme/copy").unwrap();
    assert_eq!(hub.cdn.asked().len(), 1);
    assert_eq!(source.stamp(ID).unwrap(), stamp, "nothing has to be read again");
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(2.0))]);
    source.fetch(ID).unwrap();
    assert_ne!(source.stamp(ID).unwrap(), stamp);
    assert_eq!(read(&source, ID).unwrap().generation(), cartridge(2.0).generation());
    let copy = read(&source, "acme/copy").unwrap();
    assert_eq!(copy.generation(), cartridge(1.0).generation());
}

/// Case 41: 401, 403, 404.
#[test]
fn refusals_say_what_to_set() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    hub.world().token = Some("hf_right".to_owned());
    for (token, says) in
        [(None, "HF_TOKEN must be set"), (Some("hf_wrong"), "HF_TOKEN gives no access")]
    {
        let error = hub_source(&hub, dir.path(), token).fetch(ID).unwrap_err();
        let reason = reason(&error);
        assert!(
            reason.starts_with("Could not access HuggingFace repository acme/notes: "),
            "{reason}"
        );
        assert!(reason.contains("answered 401") && reason.contains(says), "{reason}");
    }
    let source = hub_source(&hub, dir.path(), Some("hf_right"));
    source.fetch(ID).unwrap();
    let error = source.fetch("acme/nothing").unwrap_err();
    assert!(
        matches!(&error, CartridgeError::NotFound { hint, .. } if hint
        .starts_with("Could not access HuggingFace repository acme/nothing: ")),
        "{error}"
    );
    assert_eq!(hub.api.asked().len(), 5, "a refusal is not tried again");
}

/// Case 41: 429 and 500 are tried again, not for ever.
#[test]
fn a_hub_that_fails_in_passing_is_asked_again_and_not_for_ever() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    let busy = Answer::new(429, "").with("Retry-After", "1");
    hub.api.trouble("/api/", Trouble::Answer(busy), 1);
    hub.cdn.trouble("/", Trouble::Answer(Answer::new(503, "")), 1);
    let source = hub_source(&hub, dir.path(), None);
    let started = Instant::now();
    source.fetch(ID).unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1), "Retry-After is honoured");
    assert_eq!((hub.api.asked_for("/api/").len(), hub.cdn.asked().len()), (2, 2));

    hub.api.trouble("/api/", Trouble::Answer(Answer::new(500, "")), usize::MAX);
    hub.api.forget();
    let error = source.fetch(ID).unwrap_err();
    assert!(reason(&error).contains("answered 500"), "{error}");
    assert_eq!(hub.api.asked().len(), 5);
    assert!(read(&source, ID).is_ok(), "what was fetched stays");
}

/// Case 7: a source that hangs ends a fetch within its limits, and case 41: slow drip.
#[test]
fn hanging_and_dripping_end_by_the_limits_and_keep_what_came() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let bytes = torch_bytes(1.0);
    hub.commit(ID, &[("cartridge.pt", &bytes)]);
    let source = hub_source(&hub, dir.path(), None);
    hub.api.trouble("/api/", Trouble::Hang, 1);
    assert!(reason(&source.fetch(ID).unwrap_err()).contains("--source-idle-seconds"));
    hub.cdn.trouble("/", Trouble::HangAfter(1000), 1);
    assert!(reason(&source.fetch(ID).unwrap_err()).contains("sent nothing"));

    let short = cartouche::cartridge::transfer::TimeLimits {
        idle: Duration::from_secs(5),
        total: Duration::from_millis(600),
        ..times()
    };
    hub.cdn.trouble("/", Trouble::Drip(Duration::from_millis(20)), 1);
    let hasty = hub_source_within(&hub, store(dir.path()), None, short);
    assert!(reason(&hasty.fetch(ID).unwrap_err()).contains("--source-total-seconds"));

    hub.cdn.forget();
    source.fetch(ID).unwrap();
    let asked = hub.cdn.asked();
    let range = asked[0].head("range").unwrap();
    let from: usize =
        range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap();
    assert!((1000..bytes.len()).contains(&from), "goes on where it stopped: {range}");
    assert!(asked[0].head("if-range").is_some());
    assert_eq!(read(&source, ID).unwrap().generation(), cartridge(1.0).generation());
}

/// Case 41: truncated body.
#[test]
fn a_cut_download_goes_on_where_it_stopped() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    hub.cdn.trouble("/", Trouble::CutAfter(700), 2);
    let source = hub_source(&hub, dir.path(), None);
    source.fetch(ID).unwrap();
    let ranges: Vec<_> =
        hub.cdn.asked().iter().map(|a| a.head("range").map(str::to_owned)).collect();
    let range = |from: u32| Some(format!("bytes={from}-"));
    assert_eq!(ranges, [None, range(700), range(1400)]);
    assert_eq!(read(&source, ID).unwrap().generation(), cartridge(1.0).generation());
}

/// Either the server starts again itself, or it continues with something else, which the digest tells.
#[test]
fn parts_of_two_contents_are_never_put_together() {
    for trouble in [Trouble::NoRange, Trouble::NoIfRange] {
        let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
        hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
        let source = hub_source(&hub, dir.path(), None);
        hub.cdn.trouble("/", Trouble::HangAfter(900), 1);
        source.fetch(ID).unwrap_err();
        hub.commit(ID, &[("cartridge.pt", &torch_bytes(2.0))]);
        hub.cdn.trouble("/", trouble, 1);
        source.fetch(ID).unwrap();
        assert_eq!(read(&source, ID).unwrap().generation(), cartridge(2.0).generation());
    }
}

/// Case 41: wrong hash, wrong length, no content length.
#[test]
fn content_other_than_announced_is_thrown_away() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    let source = hub_source(&hub, dir.path(), None);
    hub.cdn.trouble("/", Trouble::WrongContent, 1);
    assert!(reason(&source.fetch(ID).unwrap_err()).contains("SHA-256"));
    hub.cdn.trouble("/", Trouble::WrongLength(-5), 1);
    assert!(reason(&source.fetch(ID).unwrap_err()).contains("length"));
    assert_eq!(source.stamp(ID).unwrap(), None);
    hub.cdn.trouble("/", Trouble::NoLength, 1);
    source.fetch(ID).unwrap();
    assert_eq!(read(&source, ID).unwrap().generation(), cartridge(1.0).generation());
}

#[test]
fn a_file_that_is_no_cartridge_does_not_replace_one() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    let source = hub_source(&hub, dir.path(), None);
    source.fetch(ID).unwrap();
    hub.commit(ID, &[("cartridge.pt", b"PK\x03\x04 no cartridge")]);
    let error = source.fetch(ID).unwrap_err();
    assert!(matches!(error, CartridgeError::Invalid { .. }), "{error}");
    assert_eq!(read(&source, ID).unwrap().generation(), cartridge(1.0).generation());
}

#[test]
fn a_file_over_the_limit_is_refused_before_it_comes() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &vec![0; MAX_BYTES as usize + 1])]);
    let error = hub_source(&hub, dir.path(), None).fetch(ID).unwrap_err();
    assert!(matches!(error, CartridgeError::TooLarge { .. }), "{error}");
    assert!(hub.cdn.asked().is_empty());
}

/// Case 41: redirect to another host.
#[test]
fn the_hub_cannot_send_on_to_a_host_that_is_not_listed() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let other = stand_in::StandIn::start(|_| Answer::new(200, "stolen"));
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    let away = Answer::new(302, "").with("Location", format!("{}/x?sig=hidden", other.url));
    hub.api.trouble("/resolve/", Trouble::Answer(away.clone()), 1);
    hub.cdn.trouble("/", Trouble::Answer(away), 1);
    let source = hub_source(&hub, dir.path(), Some("hf_token"));
    for _ in 0..2 {
        let error = source.fetch(ID).unwrap_err();
        assert!(reason(&error).contains("sends on to"), "{error}");
        assert!(!error.to_string().contains("hidden"), "{error}");
    }
    assert!(other.asked().is_empty(), "it was not even asked");
    let circle = Answer::new(302, "").with("Location", "/api/models/acme/notes/revision/main");
    hub.api.trouble("/api/", Trouble::Answer(circle), usize::MAX);
    assert!(reason(&source.fetch(ID).unwrap_err()).contains("in circles"));
}

/// Case 41: the token goes to the hub alone, and is not in errors.
#[test]
fn the_token_is_sent_to_the_hub_and_shown_to_nobody() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0)), ("config.yaml", b"{}")]);
    let source = hub_source(&hub, dir.path(), Some("hf_confidential"));
    source.fetch(ID).unwrap();
    let bearer = Some("Bearer hf_confidential");
    assert!(hub.api.asked().iter().all(|asked| asked.head("authorization") == bearer));
    assert!(hub.cdn.asked().iter().all(|asked| asked.head("authorization").is_none()));
    let mut shown = format!("{source:?}");
    for trouble in [Trouble::Answer(Answer::new(403, "")), Trouble::CutAfter(0), Trouble::Hang] {
        hub.api.trouble("/api/", trouble, 5);
        shown += &source.fetch(ID).unwrap_err().to_string();
    }
    assert!(!shown.contains("confidential") && !shown.contains("signed"), "{shown}");
    let record = format!("{:?}", source.record(ID).unwrap());
    assert!(!record.contains("confidential") && !record.contains("signed"), "{record}");
}

#[test]
fn a_stopping_server_does_not_wait_for_a_source_that_hangs() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    hub.api.trouble("/api/", Trouble::Hang, 1);
    let transfer = cartouche::cartridge::transfer::Transfer::new(
        cartouche::cartridge::transfer::TimeLimits::default(),
    );
    let remote = cartouche::cartridge::HuggingFace::new(
        &hub.api.url,
        None,
        cartouche::cartridge::transfer::Hosts::default(),
        false,
    );
    let source = cartouche::cartridge::Cached::new(
        remote.unwrap(),
        transfer.clone(),
        store(dir.path()),
        MAX_BYTES,
    );
    let fetching = std::thread::spawn(move || source.fetch(ID));
    while hub.api.asked().is_empty() {
        std::thread::yield_now();
    }
    transfer.stop();
    // Without `stop` this would take the 30 s of the idle limit, and fail with its message.
    let error = fetching.join().unwrap().unwrap_err();
    assert!(reason(&error).contains("the server is stopping"), "{error}");
}

#[test]
fn offline_is_what_the_cache_holds() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.commit(ID, &[("cartridge.pt", &torch_bytes(1.0))]);
    hub_source(&hub, dir.path(), None).fetch(ID).unwrap();
    hub.api.forget();
    let hosts = cartouche::cartridge::transfer::Hosts::default();
    let remote = cartouche::cartridge::HuggingFace::new(&hub.api.url, None, hosts, true).unwrap();
    let transfer = cartouche::cartridge::transfer::Transfer::new(times());
    let source = cartouche::cartridge::Cached::new(remote, transfer, store(dir.path()), MAX_BYTES);
    assert_eq!(read(&source, ID).unwrap().generation(), cartridge(1.0).generation());
    let error = source.fetch(ID).unwrap_err();
    assert!(reason(&error).contains("HF_HUB_OFFLINE"), "{error}");
    assert!(hub.api.asked().is_empty());
}
