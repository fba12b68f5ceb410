//! Every field with every odd value: an answer or a 4xx that says why, never a 5xx, never a hang.

mod api_support;

use api_support::{Server, merge};
use serde_json::{Value, json};

const FIELDS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "cartridges",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "add_special_tokens",
    "prompt_logprobs",
    "logprobs",
    "top_logprobs",
    "logprobs_in_fingerprint",
    "logprobs_ignore_temperature",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "stream",
    "stream_options",
    "priority",
    "tools",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "apply_chat_template_overrides",
    "add_generation_prompt",
    "continue_final_message",
    "echo",
    "best_of",
    "response_format",
    "tool_choice",
    "suffix",
    "user",
];

fn odd_values() -> Vec<Value> {
    vec![
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(1),
        json!(-1),
        json!(0.5),
        json!(1e308),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(""),
        json!("x"),
        json!("\u{0}\u{FFFD}😀"),
        json!("{{ messages }}{% for"),
        json!([]),
        json!([null]),
        json!([1]),
        json!(["a"]),
        json!([[]]),
        json!([{}]),
        json!([{"id": "a"}]),
        json!([{"id": "../../etc/passwd", "source": "local"}]),
        json!([{"role": "", "content": ""}]),
        json!([{"role": "user", "content": [{"type": "text", "text": ""}]}]),
        json!([{"role": "assistant", "content": null, "tool_calls": [{"function": {"arguments": "["}}]}]),
        json!({}),
        json!({"1": 1}),
        json!({"-1": "a"}),
        json!({"type": "text"}),
        json!({"messages": 1, "tools": 2, "add_generation_prompt": 3}),
    ]
}

#[tokio::test]
async fn odd_values_are_answered_or_refused() {
    let server = Server::shared();
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    let text = json!({"prompt": "Hi", "max_tokens": 2});
    for (path, base) in [("/v1/chat/completions", &chat), ("/v1/completions", &text)] {
        for field in FIELDS {
            for value in odd_values() {
                // Without a limit an answer fills the context: skipped, for time.
                let mut body = base.clone();
                if *field == "max_tokens" || *field == "max_completion_tokens" {
                    body = merge(body, json!({"max_tokens": null}));
                }
                body[*field] = value.clone();
                let unlimited =
                    body["max_tokens"].is_null() && body["max_completion_tokens"].is_null();
                if unlimited {
                    continue;
                }
                let reply = server.post(path, body).await;
                let status = reply.status.as_u16();
                if status == 200 {
                    continue;
                }
                let (_, param, message) = reply.error();
                assert!(
                    (400..500).contains(&status) || status == 502,
                    "{path} {field}={value}: {status} {message}"
                );
                assert!(!message.is_empty() && param.len() < 200);
            }
        }
    }
    // The engine publishes its load after each step, a little later than the last reply.
    for _ in 0..200 {
        let stats = server.state.engine.stats();
        if (stats.waiting, stats.running, stats.used_blocks) == (0, 0, 0) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the engine still holds {:?}", server.state.engine.stats());
}
