use serde_json::json;

use super::*;

const BOUNDS: Bounds<'static> =
    Bounds { vocab_size: 100, max_top_logprobs: 20, eos_token_ids: &[2, 3] };

fn settings(fields: Value) -> Result<Settings, ApiError> {
    let fields: CommonFields = serde_json::from_value(fields).unwrap();
    Settings::new(&fields, LogprobRequest::default(), false, BOUNDS)
}

fn refused(fields: Value) -> (String, String) {
    let error = settings(fields).unwrap_err();
    (error.param.unwrap_or_default(), error.message)
}

#[test]
fn defaults_are_openai_s() {
    let s = settings(json!({})).unwrap();
    assert_eq!(s.n, 1);
    assert_eq!(s.sampling, SamplingParams::default());
    assert_eq!(s.sampling.temperature, 1.0);
    assert_eq!(s.max_tokens, None);
    assert_eq!(s.eos_token_ids, [2, 3]);
    assert!(s.skip_special_tokens && !s.stream && !s.include_stop);
}

#[test]
fn every_field_arrives() {
    let s = settings(json!({
        "n": 3, "max_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 40,
        "min_p": 0.05, "presence_penalty": -1, "frequency_penalty": 0.5, "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "6": 1.5}, "seed": -1, "stop": ["a", "b"], "stop_token_ids": [9],
        "include_stop_str_in_output": true, "ignore_eos": true, "skip_special_tokens": false,
        "add_special_tokens": true, "prompt_logprobs": 4, "logprobs_in_fingerprint": true,
        "logprobs_ignore_temperature": true, "return_token_ids": true,
        "return_tokens_as_token_ids": true,
    }))
    .unwrap();
    let expected = SamplingParams {
        temperature: 0.5,
        top_p: 0.9,
        top_k: 40,
        min_p: 0.05,
        presence_penalty: -1.0,
        frequency_penalty: 0.5,
        repetition_penalty: 1.5,
        logit_bias: vec![(5, -100.0), (6, 1.5)],
        seed: Some(u64::MAX),
        min_tokens: 2,
        ..SamplingParams::default()
    };
    assert_eq!(s.sampling, expected);
    assert_eq!((s.n, s.max_tokens), (3, Some(7)));
    assert_eq!(s.stop, ["a", "b"]);
    assert_eq!(s.stop_token_ids, [9]);
    assert!(s.eos_token_ids.is_empty());
    assert!(s.include_stop && !s.skip_special_tokens && s.return_token_ids && s.tokens_as_ids);
    assert_eq!(s.add_special_tokens, Some(true));
    let options = s.logprobs.options();
    assert_eq!(options, LogprobOptions { top: 0, prompt_top: Some(4), ignore_temperature: true });
    assert!(s.logprobs.in_fingerprint);
}

#[test]
fn edges_of_the_sampling_fields() {
    assert_eq!(settings(json!({"temperature": 1e-9})).unwrap().sampling.temperature, 0.0);
    assert_eq!(settings(json!({"temperature": 0})).unwrap().sampling.temperature, 0.0);
    assert_eq!(settings(json!({"top_k": -1})).unwrap().sampling.top_k, 0);
    let greedy = settings(json!({"top_p": 0})).unwrap().sampling;
    assert_eq!((greedy.top_k, greedy.top_p), (1, 1.0));
    assert_eq!(settings(json!({"stop": "x"})).unwrap().stop, ["x"]);
    assert!(settings(json!({"stop": []})).unwrap().stop.is_empty());
    for (fields, param) in [
        (json!({"n": 0}), "n"),
        (json!({"n": 65}), "n"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"top_p": 1.01}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"presence_penalty": 2.5}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias.x"),
        (json!({"logit_bias": {"100": 1}}), "logit_bias.100"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias.1"),
        (json!({"logit_bias": {"1": "a"}}), "logit_bias.1"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": ["a", ""]}), "stop"),
        (json!({"stop": ["a", 3]}), "stop[1]"),
        (json!({"stop": vec!["a"; 17]}), "stop"),
        (json!({"stop": "x".repeat(2000)}), "stop"),
        (json!({"stop_token_ids": [100]}), "stop_token_ids"),
        (json!({"min_tokens": 9, "max_tokens": 8}), "min_tokens"),
        (json!({"min_tokens": -1}), "min_tokens"),
        (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (json!({"stream": true, "prompt_logprobs": 1}), "prompt_logprobs"),
    ] {
        assert_eq!(refused(fields.clone()).0, param, "{fields}");
    }
}

#[test]
fn max_tokens_has_two_names() {
    assert_eq!(settings(json!({"max_completion_tokens": 5})).unwrap().max_tokens, Some(5));
    let both = json!({"max_tokens": 5, "max_completion_tokens": 5});
    assert_eq!(settings(both).unwrap().max_tokens, Some(5));
    let (param, message) = refused(json!({"max_tokens": 5, "max_completion_tokens": 6}));
    assert_eq!(param, "max_tokens");
    assert!(message.starts_with("exactly one of max_tokens or max_completion_tokens must be set"));
    for bad in [0, -4] {
        assert_eq!(refused(json!({"max_tokens": bad})).1, "max tokens must be greater than 0");
    }
    let zero = CommonFields { max_tokens: Some(0), ..CommonFields::default() };
    let s = Settings::new(&zero, LogprobRequest::default(), true, BOUNDS).unwrap();
    assert_eq!(s.max_tokens, Some(0));
}

#[test]
fn logprob_messages_are_the_stock_ones() {
    let message = |r: Result<LogprobRequest, ApiError>| r.unwrap_err().message;
    assert_eq!(
        message(chat_logprobs(None, Some(5), BOUNDS)),
        "logprobs must be True if top_logprobs is set"
    );
    assert_eq!(
        message(chat_logprobs(Some(true), Some(-1), BOUNDS)),
        "top_logprobs must be non-negative"
    );
    assert_eq!(
        message(chat_logprobs(Some(true), Some(21), BOUNDS)),
        "top_logprobs=21 but engine was configured with max_topk_logprobs=20"
    );
    assert_eq!(
        message(completion_logprobs(Some(-1), false, BOUNDS)),
        "logprobs must be non-negative"
    );
    let chosen_only = completion_logprobs(Some(0), true, BOUNDS).unwrap();
    assert!(chosen_only.show);
    assert_eq!(chosen_only.options().prompt_top, Some(0));
    assert!(!completion_logprobs(None, false, BOUNDS).unwrap().show);
    assert_eq!(chat_logprobs(Some(true), Some(20), BOUNDS).unwrap().options().top, 20);
    assert_eq!(chat_logprobs(None, Some(0), BOUNDS).unwrap(), LogprobRequest::default());
}

#[test]
fn the_budget_counts_prompt_and_cartridges() {
    assert_eq!(token_budget(Some(5), None, 3, 2, 10).unwrap(), 5);
    assert_eq!(token_budget(None, None, 3, 2, 10).unwrap(), 5);
    assert_eq!(token_budget(None, Some(16), 3, 2, 10).unwrap(), 5);
    assert_eq!(token_budget(None, Some(2), 3, 2, 10).unwrap(), 2);
    assert_eq!(token_budget(Some(0), None, 10, 0, 10).unwrap(), 0);
    for (requested, prompt) in [(Some(6), 3), (None, 8), (Some(1), 100), (Some(0), 100)] {
        let error = token_budget(requested, None, prompt, 2, 10).unwrap_err();
        assert_eq!(error.code, Some("context_length_exceeded"));
        let start = format!("Request has prompt length = {prompt} and max_tokens = ");
        assert!(error.message.starts_with(&start), "{}", error.message);
    }
}

#[test]
fn work_is_bounded_as_a_product() {
    let mut s = settings(json!({"n": 64})).unwrap();
    assert!(s.check_work(&[5; 16], 1000).is_ok());
    assert_eq!(s.check_work(&[5; 17], 1000).unwrap_err().param.as_deref(), Some("n"));
    s.logprobs.top = 20;
    assert!(s.check_work(&[5], 700).is_ok());
    assert!(s.check_work(&[5], 100_000).is_err());
}

#[test]
fn prompt_logprobs_count_once_per_choice() {
    let mut s = settings(json!({"n": 1, "prompt_logprobs": 15})).unwrap();
    let prompt = limits::MAX_LOGPROBS_PER_REQUEST / 16;
    assert!(s.check_work(&[prompt], 1).is_ok());
    s.n = 2;
    assert!(s.check_work(&[prompt], 1).is_err());
    assert!(s.check_work(&[prompt / 2], 1).is_ok());
}

#[test]
fn echo_alone_computes_no_log_probabilities() {
    let options = |fields: Value, logprobs| {
        let logprobs = completion_logprobs(logprobs, true, BOUNDS).unwrap();
        let fields: CommonFields = serde_json::from_value(fields).unwrap();
        Settings::new(&fields, logprobs, true, BOUNDS).unwrap().logprobs.options()
    };
    assert_eq!(options(json!({"max_tokens": 5}), None).prompt_top, None);
    assert_eq!(options(json!({"max_tokens": 5}), Some(3)).prompt_top, Some(3));
    assert_eq!(options(json!({"max_tokens": 0}), None).prompt_top, Some(0));
    let both = options(json!({"max_tokens": 5, "prompt_logprobs": 2}), None);
    assert_eq!(both.prompt_top, Some(2));
}

#[test]
fn priorities_have_names_and_vllm_integers() {
    for (value, expected) in [
        (r#""interactive""#, Priority::Interactive),
        (r#""batch""#, Priority::Batch),
        ("0", Priority::Interactive),
        ("-5", Priority::Interactive),
        ("1", Priority::Batch),
        ("18446744073709551615", Priority::Batch),
        ("null", Priority::Interactive),
    ] {
        let value: Value = serde_json::from_str(value).unwrap();
        assert_eq!(priority(Some(&value)).unwrap(), expected, "{value}");
    }
    assert_eq!(priority(None).unwrap(), Priority::Interactive);
    for value in [r#""urgent""#, r#""""#, "1.5", "true", "[]", "{}"] {
        let value: Value = serde_json::from_str(value).unwrap();
        assert_eq!(priority(Some(&value)).unwrap_err().param.as_deref(), Some("priority"));
    }
}
