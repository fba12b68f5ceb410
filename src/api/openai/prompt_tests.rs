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

fn how(has_cartridges: bool, add_special_tokens: bool) -> Tokenising {
    Tokenising { has_cartridges, add_special_tokens, request_templates: false, max_context: 100 }
}

fn hello(extra: Value) -> ChatPrompt {
    let mut body = json!({"messages": [{"role": "user", "content": "hello"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    ChatPrompt::new(serde_json::from_value(body).unwrap()).unwrap()
}

#[test]
fn bos_comes_from_the_template_or_on_request() {
    let model = model_with_bos(false, Some("{{ messages[0].content }}"));
    let ids =
        |special| hello(json!({})).tokenise(&model, how(true, special), &mut vec![]).unwrap().ids;
    assert_eq!(ids(false), [1]);
    assert_eq!(ids(true), [0, 1]);
    assert_eq!(encode(&model, "hello".to_owned(), how(true, true), "prompt").unwrap().ids, [0, 1]);
    let empty = encode(&model, String::new(), how(true, false), "prompt").unwrap_err();
    assert_eq!(empty.param.as_deref(), Some("prompt"));
    assert_eq!(encode(&model, String::new(), how(true, true), "prompt").unwrap().ids, [0]);
}

#[test]
fn llama3_cartridges_get_the_prompt_they_are_trained_with() {
    let model = model_with_bos(true, Some("<s>{{ messages[0].content }}"));
    let text = |prompt: ChatPrompt, cartridges, ignored: &mut Vec<String>| {
        let how = Tokenising { request_templates: true, ..how(cartridges, false) };
        prompt.tokenise(&model, how, ignored).unwrap().text.unwrap()
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
    let error = hello(json!({})).tokenise(&model, how(false, false), &mut vec![]).unwrap_err();
    assert!(error.message.contains("no chat template"), "{}", error.message);
    assert_eq!(error.status.as_u16(), 400);
}

#[test]
fn a_template_of_the_request_is_refused_in_every_way_in() {
    for (model, template) in
        [(model_with_bos(false, Some("x")), "{{ 1 }}"), (model_with_bos(true, None), "{% if")]
    {
        for extra in [
            json!({"chat_template": template}),
            json!({"chat_template_kwargs": {"chat_template": template}}),
            json!({"apply_chat_template_overrides": {"chat_template": template}}),
        ] {
            let error = hello(extra).tokenise(&model, how(true, false), &mut vec![]).unwrap_err();
            assert_eq!(error.status.as_u16(), 400);
            assert_eq!(error.code, Some("unsupported_parameter"));
            assert_eq!(error.param.as_deref(), Some("chat_template"));
        }
    }
}

#[test]
fn names_of_the_model_s_own_templates_stay_usable() {
    let config = json!({"chat_template": [
        {"name": "default", "template": "d"}, {"name": "rag", "template": "hello"},
    ]});
    let mut model = model_with_bos(false, None);
    model.chat_template = ChatTemplate::from_config(&config, None).unwrap();
    let prompt = hello(json!({"chat_template": "rag"}));
    assert_eq!(prompt.tokenise(&model, how(false, false), &mut vec![]).unwrap().ids, [1]);
}

#[test]
fn a_null_template_in_the_overrides_is_an_absent_one() {
    let model = model_with_bos(true, Some("own {{ messages[0].content }}"));
    let text = |extra: Value| {
        let how = Tokenising { request_templates: true, ..how(true, false) };
        hello(extra).tokenise(&model, how, &mut vec![]).unwrap().text.unwrap()
    };
    for name in ["chat_template_kwargs", "apply_chat_template_overrides"] {
        assert!(
            text(json!({name: {"chat_template": null}})).starts_with("<|start_header_id|>"),
            "{name}"
        );
    }
    let given =
        json!({"chat_template": "given", "apply_chat_template_overrides": {"chat_template": null}});
    assert_eq!(text(given), "given");
}

#[test]
fn llama3_cartridge_prompts_drop_nothing_in_silence() {
    let model = model_with_bos(true, None);
    let tokenise = |message: Value, ignored: &mut Vec<String>| {
        let body = json!({"messages": [{"role": "user", "content": "hello"}, message]});
        let prompt = ChatPrompt::new(serde_json::from_value(body).unwrap()).unwrap();
        prompt.tokenise(&model, how(true, false), ignored)
    };
    let calls = json!({"role": "assistant", "content": "", "tool_calls": [{"function": {}}]});
    let error = tokenise(calls, &mut vec![]).unwrap_err();
    assert_eq!(error.code, Some("unsupported_parameter"));
    assert_eq!(error.param.as_deref(), Some("messages[1].tool_calls"));
    let mut ignored = vec![];
    let named = json!({"role": "user", "content": "a", "name": "n", "reasoning_content": "r"});
    tokenise(named, &mut ignored).unwrap();
    assert_eq!(ignored, ["messages.name", "messages.reasoning_content"]);
}

#[test]
fn template_errors_blame_whose_template_it_is() {
    let fuel = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}";
    let raise = "{{ raise_exception('no') }}";
    let model = model_with_bos(false, Some("x"));
    for source in [fuel, raise, "{% if %}", "{{ a.b.c }}"] {
        let how = Tokenising { request_templates: true, ..how(false, false) };
        let prompt = hello(json!({"chat_template": source}));
        let error = prompt.tokenise(&model, how, &mut vec![]).unwrap_err();
        assert_eq!(error.status.as_u16(), 400);
        assert_eq!(error.param.as_deref(), Some("chat_template"), "{source}");
    }
    let own = |source| {
        let model = model_with_bos(false, Some(source));
        hello(json!({})).tokenise(&model, how(false, false), &mut vec![]).unwrap_err()
    };
    let error = own(fuel);
    assert_eq!((error.status.as_u16(), error.code), (500, Some("template_error")));
    for source in [raise, "{{ a.b.c }}"] {
        let error = own(source);
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some("messages")));
    }
}

#[test]
fn a_text_that_cannot_fit_is_refused_before_it_is_tokenised() {
    let json = crate::demo::model_file("tokenizer.json").unwrap();
    let mut model = model_with_bos(false, None);
    model.tokenizer = Tokenizer::from_bytes(json).unwrap();
    let limit = model.tokenizer.max_text_bytes(100).unwrap();
    check_text(&model, &"x".repeat(limit), 100).unwrap();
    let error = encode(&model, "x".repeat(limit + 1), how(false, false), "prompt").unwrap_err();
    assert_eq!(error.code, Some("context_length_exceeded"));
    assert!(error.message.contains("bytes"), "not counted in tokens: {}", error.message);
    // One unknown token can stand for any text: nothing is known before.
    let words = model_with_bos(false, None);
    assert_eq!(words.tokenizer.max_text_bytes(100), None);
}

#[test]
fn ids_the_tokenizer_adds_are_told_from_those_in_the_text() {
    let model = model_with_bos(false, None);
    let prompt = encode(&model, "<s>hello".to_owned(), how(false, true), "prompt").unwrap();
    assert_eq!((prompt.ids, prompt.added), (vec![0, 0, 1], 1));
    let prompt = encode(&model, "<s>hello".to_owned(), how(false, false), "prompt").unwrap();
    assert_eq!((prompt.ids, prompt.added), (vec![0, 1], 0));
}
