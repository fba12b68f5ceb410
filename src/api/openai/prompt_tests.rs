use serde_json::json;

use super::*;
use crate::text::{ChatTemplate, Tokenizer};

fn ending(body: Value) -> Result<(bool, bool), ApiError> {
    let prompt = ChatPrompt::new(serde_json::from_value(body).unwrap())?;
    Ok((prompt.add_generation_prompt, prompt.continue_final_message))
}

#[test]
fn the_last_message_decides_how_the_prompt_ends() {
    let chat = |role: &str, extra: Value| {
        let mut body = json!({"messages": [{"role": role, "content": "x"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ending(body)
    };
    for role in ["user", "system", "tool"] {
        assert_eq!(chat(role, json!({})).unwrap(), (true, false));
    }
    assert_eq!(chat("assistant", json!({})).unwrap(), (false, true));
    let new_turn = json!({"add_generation_prompt": true});
    assert_eq!(chat("assistant", new_turn).unwrap(), (true, false));
    let overrides = json!({"apply_chat_template_overrides": {"add_generation_prompt": false}});
    assert_eq!(chat("user", overrides).unwrap(), (false, false));
    let both = json!({"add_generation_prompt": true, "continue_final_message": true});
    assert!(chat("user", both).is_err());
    let wrong = json!({"chat_template_kwargs": {"add_generation_prompt": "yes"}});
    assert_eq!(chat("user", wrong).unwrap_err().param.as_deref(), Some("add_generation_prompt"));
}

#[test]
fn template_arguments_are_merged() {
    let body = json!({
        "messages": [{"role": "user", "content": "x"}],
        "chat_template_kwargs": {"enable_thinking": true, "a": 1},
        "apply_chat_template_overrides": {"enable_thinking": false},
        "documents": [{"text": "d"}],
        "tools": [],
    });
    let prompt = ChatPrompt::new(serde_json::from_value(body).unwrap()).unwrap();
    let expected = json!({"enable_thinking": false, "a": 1, "documents": [{"text": "d"}]});
    assert_eq!(Value::Object(prompt.kwargs), expected);
    assert_eq!(prompt.tools, None);
}

#[test]
fn prompts_have_four_forms() {
    let inputs = |v| completion_inputs(v, 10);
    assert_eq!(inputs(json!("a")).unwrap(), [Input::Text("a".into())]);
    assert_eq!(inputs(json!([1, 2])).unwrap(), [Input::Ids(vec![1, 2])]);
    let two = [Input::Text("a".into()), Input::Text("b".into())];
    assert_eq!(inputs(json!(["a", "b"])).unwrap(), two);
    let two = [Input::Ids(vec![1]), Input::Ids(vec![2, 3])];
    assert_eq!(inputs(json!([[1], [2, 3]])).unwrap(), two);
    for (prompt, param) in [
        (json!([]), "prompt"),
        (json!([[]]), "prompt[0]"),
        (json!([1, "a"]), "prompt[1]"),
        (json!([1, 10]), "prompt[1]"),
        (json!([[1], [-1]]), "prompt[1][0]"),
        (json!(["a", 1]), "prompt[1]"),
        (json!({"a": 1}), "prompt"),
        (json!(vec!["a"; limits::MAX_PROMPTS + 1]), "prompt"),
    ] {
        assert_eq!(inputs(prompt).unwrap_err().param.as_deref(), Some(param));
    }
}

/// A model whose tokenizer adds `<s>`: two words and the special token.
fn model_with_bos(is_llama3: bool, template: Option<&str>) -> ServedModel {
    let json = json!({
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "?",
                  "vocab": {"<s>": 0, "hello": 1, "?": 2, "user": 3, "eot_id": 4}},
    });
    ServedModel {
        name: "m".to_owned(),
        tokenizer: Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap(),
        chat_template: template.map(|t| ChatTemplate::new(t, Map::new()).unwrap()),
        eos_token_ids: vec![],
        is_llama3,
    }
}

fn hello(extra: Value) -> ChatPrompt {
    let mut body = json!({"messages": [{"role": "user", "content": "hello"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    ChatPrompt::new(serde_json::from_value(body).unwrap()).unwrap()
}

#[test]
fn bos_comes_from_the_template_or_on_request() {
    let model = model_with_bos(false, Some("{{ messages[0].content }}"));
    let ids = |special| hello(json!({})).tokenise(&model, true, special, &mut vec![]).unwrap().ids;
    assert_eq!(ids(false), [1]);
    assert_eq!(ids(true), [0, 1]);
    assert_eq!(encode(&model, "hello".to_owned(), true, "prompt").unwrap().ids, [0, 1]);
    let empty = encode(&model, String::new(), false, "prompt").unwrap_err();
    assert_eq!(empty.param.as_deref(), Some("prompt"));
    assert_eq!(encode(&model, String::new(), true, "prompt").unwrap().ids, [0]);
}

#[test]
fn llama3_cartridges_get_the_prompt_they_are_trained_with() {
    let model = model_with_bos(true, Some("<s>{{ messages[0].content }}"));
    let text = |prompt: ChatPrompt, cartridges, ignored: &mut Vec<String>| {
        prompt.tokenise(&model, cartridges, false, ignored).unwrap().text.unwrap()
    };
    let mut ignored = vec![];
    assert_eq!(text(hello(json!({})), false, &mut ignored), "<s>hello");
    assert_eq!(
        text(hello(json!({})), true, &mut ignored),
        "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    assert!(ignored.is_empty());
    let dropped = json!({"tools": [{"type": "function"}], "chat_template_kwargs": {"a": 1}});
    text(hello(dropped), true, &mut ignored);
    assert_eq!(ignored, ["tools", "chat_template_kwargs.a"]);
    let own = json!({"chat_template": "own {{ messages[0].content }}"});
    assert_eq!(text(hello(own), true, &mut vec![]), "own hello");
}

#[test]
fn a_model_without_a_template_says_so() {
    let model = model_with_bos(false, None);
    let error = hello(json!({})).tokenise(&model, false, false, &mut vec![]).unwrap_err();
    assert!(error.message.contains("no chat template"), "{}", error.message);
    assert_eq!(error.status.as_u16(), 400);
}
