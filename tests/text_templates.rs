//! Chat templates render byte for byte what transformers renders, and refuse what it refuses.
//! `scripts/fixtures/templates.py` writes the fixtures.

use cartouche::text::{ChatTemplate, TemplateRequest, TextError};
use serde_json::{Map, Value, json};

fn fixture(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/templates/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn request<'a>(messages: &'a [Value], kwargs: &'a Map<String, Value>) -> TemplateRequest<'a> {
    TemplateRequest {
        messages,
        tools: None,
        add_generation_prompt: false,
        continue_final_message: false,
        kwargs,
    }
}

/// Renders every case of a fixture; returns the differences.
fn differences(name: &str) -> Vec<String> {
    let fixture = fixture(name);
    let template = fixture["template"].as_str().unwrap();
    let special = fixture["special_tokens"].as_object().unwrap().clone();
    let now = fixture["now"].as_str().unwrap().parse().unwrap();
    let template = ChatTemplate::new(template, special).unwrap().with_clock(now).unwrap();
    let mut differences = Vec::new();
    for case in fixture["cases"].as_array().unwrap() {
        let messages = case["messages"].as_array().unwrap();
        let arguments = case["arguments"].as_object().unwrap();
        let result = template.render(&request(messages, arguments));
        let same = match (&result, case["text"].as_str(), case["raised"].as_str()) {
            (Ok(text), Some(expected), _) => text == expected,
            (Err(TextError::TemplateRaised { message }), None, Some(expected)) => {
                message == expected
            }
            (Err(_), None, None) => true,
            _ => false,
        };
        if !same {
            let expected = case.get("text").or(case.get("raised")).or(case.get("error"));
            let expected = expected.and_then(Value::as_str);
            let name = &case["name"];
            differences.push(format!("{name}\n  expected {expected:?}\n  got      {result:?}"));
        }
    }
    assert!(fixture["cases"].as_array().unwrap().len() > 100);
    differences
}

#[track_caller]
fn same_as_transformers(name: &str) {
    let differences = differences(name);
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        differences.join("\n")
    );
}

#[test]
fn chatml() {
    same_as_transformers("chatml");
}

#[test]
fn llama31() {
    same_as_transformers("llama31");
}

#[test]
fn mistral() {
    same_as_transformers("mistral");
}

#[test]
fn qwen3() {
    same_as_transformers("qwen3");
}

#[test]
fn corners_of_the_language() {
    same_as_transformers("corners");
}

fn user(text: &str) -> Vec<Value> {
    vec![json!({"role": "user", "content": text})]
}

#[test]
fn configuration_forms() {
    let messages = user("hi");
    let none = Map::new();
    let render = |config: &Value, file: Option<&str>, tools: Option<&Value>, kwargs: &Map<_, _>| {
        let template = ChatTemplate::from_config(config, file).unwrap().unwrap();
        template.render_trusted(&TemplateRequest { tools, ..request(&messages, kwargs) })
    };
    let config = json!({
        "chat_template":
            "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ pad_token is defined }}",
        "bos_token": "<b>", "eos_token": {"content": "<e>", "lstrip": false}, "pad_token": null,
        "add_bos_token": true, "extra_special_tokens": {"image_token": "<i>"},
    });
    assert_eq!(render(&config, None, None, &none).unwrap(), "<b><e><i>False");
    // The file wins over the configuration.
    assert_eq!(render(&config, Some("file {{ bos_token }}"), None, &none).unwrap(), "file <b>");

    let named = json!({"chat_template": [
        {"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"},
        {"name": "rag", "template": "r"},
    ]});
    let tools = json!([{"type": "function"}]);
    assert_eq!(render(&named, None, None, &none).unwrap(), "d");
    assert_eq!(render(&named, None, Some(&tools), &none).unwrap(), "t");
    let kwargs = |value: Value| value.as_object().unwrap().clone();
    assert_eq!(render(&named, None, None, &kwargs(json!({"chat_template": "rag"}))).unwrap(), "r");
    let own = kwargs(json!({"chat_template": "{{ messages[0].content }}!", "tools": tools}));
    assert_eq!(render(&named, None, None, &own).unwrap(), "hi!");
    assert_eq!(render(&named, None, Some(&tools), &kwargs(json!({"tools": null}))).unwrap(), "d");

    let nameless = json!({"chat_template": [{"name": "rag", "template": "r"}]});
    let e = render(&nameless, None, None, &none).unwrap_err();
    assert!(matches!(e, TextError::NoTemplate { ref known, .. } if known == &["rag"]), "{e}");

    assert!(ChatTemplate::from_config(&json!({}), None).unwrap().is_none());
    for wrong in [json!(3), json!([{"name": "x"}])] {
        let e = ChatTemplate::from_config(&json!({"chat_template": wrong}), None).unwrap_err();
        assert!(matches!(e, TextError::Config { .. }), "{e}");
    }
}

#[test]
fn arguments_of_a_wrong_type_are_refused_by_name() {
    let template = ChatTemplate::new("{{ messages[0].content }}", Map::new()).unwrap();
    let messages = user("hi");
    for (name, value) in [
        ("messages", json!([])),
        ("tools", json!({})),
        ("documents", json!("x")),
        ("chat_template", json!(1)),
        ("add_generation_prompt", json!("yes")),
        ("continue_final_message", json!(1)),
    ] {
        let kwargs = [(name.to_owned(), value)].into_iter().collect();
        let e = template.render(&request(&messages, &kwargs)).unwrap_err();
        assert!(matches!(&e, TextError::InvalidKwarg { name: n, .. } if n == name), "{e}");
    }
    let kwargs = [("chat_template".to_owned(), json!("{% if %}"))].into_iter().collect();
    let e = template.render_trusted(&request(&messages, &kwargs)).unwrap_err();
    assert!(matches!(e, TextError::TemplateSyntax { .. }), "{e}");
    let e = template.render(&request(&[json!("hi")], &Map::new())).unwrap_err();
    assert!(matches!(e, TextError::InvalidMessages { .. }), "{e}");
}

#[test]
fn a_template_source_in_the_request_is_refused_unless_trusted() {
    let named = json!({"chat_template": [
        {"name": "default", "template": "d"}, {"name": "rag", "template": "r"},
    ]});
    let many = ChatTemplate::from_config(&named, None).unwrap().unwrap();
    let one = ChatTemplate::new("d", Map::new()).unwrap();
    let messages = user("hi");
    let kwargs = |source: &str| Map::from_iter([("chat_template".to_owned(), json!(source))]);
    // Doubling a string forty times is far below the fuel and far above any memory.
    let bomb = "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}\
                {% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    for template in [&many, &one] {
        let e = template.render(&request(&messages, &kwargs(bomb))).unwrap_err();
        assert_eq!(e, TextError::RequestTemplate);
        let e = template.render(&request(&messages, &kwargs("{% if %}"))).unwrap_err();
        assert_eq!(e, TextError::RequestTemplate, "not even parsed");
    }
    assert_eq!(many.render(&request(&messages, &kwargs("rag"))).unwrap(), "r");
    let own = kwargs("{{ messages[0].content }}!");
    assert_eq!(one.render_trusted(&request(&messages, &own)).unwrap(), "hi!");
}

#[test]
fn continuing_wins_over_the_generation_prompt() {
    let source = "{% for m in messages %}[{{ m.content }}]{% endfor %}\
                  {% if add_generation_prompt %}>{% endif %}";
    let template = ChatTemplate::new(source, Map::new()).unwrap();
    let messages = user("hi ");
    let kwargs = Map::new();
    let both = TemplateRequest {
        add_generation_prompt: true,
        continue_final_message: true,
        ..request(&messages, &kwargs)
    };
    assert_eq!(template.render(&both).unwrap(), "[hi ");
    let open = TemplateRequest { continue_final_message: false, ..both };
    assert_eq!(template.render(&open).unwrap(), "[hi ]>");
    // A template that drops the final message cannot continue it.
    let template =
        ChatTemplate::new("{% if messages[0].content %}x{% endif %}", Map::new()).unwrap();
    let e = template.render(&both).unwrap_err();
    assert!(matches!(e, TextError::ContinueFinal { .. }), "{e}");
}

#[test]
fn snippets() {
    let fixture = fixture("snippets");
    let messages = fixture["messages"].as_array().unwrap();
    let special = fixture["special_tokens"].as_object().unwrap();
    let now = fixture["now"].as_str().unwrap().parse().unwrap();
    let kwargs = Map::new();
    let mut differences = Vec::new();
    for case in fixture["cases"].as_array().unwrap() {
        let source = case["template"].as_str().unwrap();
        let result = ChatTemplate::new(source, special.clone())
            .and_then(|t| t.with_clock(now)?.render(&request(messages, &kwargs)));
        let same = match (&result, case["text"].as_str(), case["raised"].as_str()) {
            (Ok(text), Some(expected), _) => text == expected,
            (Err(TextError::TemplateRaised { message }), None, Some(expected)) => {
                message == expected
            }
            (Err(_), None, None) => true,
            _ => false,
        };
        if !same {
            let expected = case.get("text").or(case.get("error"));
            differences.push(format!("{source:?}\n  expected {expected:?}\n  got      {result:?}"));
        }
    }
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        differences.join("\n")
    );
}

/// Values of a few bytes, deep enough and indented, are hundreds of bytes each: half a gigabyte of text from
/// a body of two megabytes, before the length of the prompt is looked at.
#[test]
fn indentation_is_bounded_before_it_is_built() {
    let source = "{% set text = documents | tojson(indent=4) %}{{ text | length }}";
    let template = ChatTemplate::new(source, Map::new()).unwrap();
    let user = user("x");
    let render = |values: usize| {
        let list = json!(vec![0; values]);
        let documents = (0..120).fold(list, |inner, _| json!([inner]));
        let kwargs = json!({"documents": documents});
        template.render(&request(&user, kwargs.as_object().unwrap()))
    };
    assert!(render(1000).unwrap().parse::<usize>().unwrap() > 400_000);
    let limit = cartouche::limits::MAX_RENDERED_PROMPT_BYTES;
    assert_eq!(render(500_000), Err(TextError::TemplateTooLarge { limit }));
}
