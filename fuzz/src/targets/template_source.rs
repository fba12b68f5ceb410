//! The source of a chat template, which comes with a model. Compiling any text is safe; rendering is, as far
//! as `ChatTemplate::render_trusted` promises: steps and output are bounded, values on the way are not, so
//! that sources which multiply values are compiled only.

use cartouche::{
    limits,
    text::{ChatTemplate, TextError},
};
use serde_json::{Map, Value, json};

use super::{Bounds, Linear, Outcome, Target, fixtures};
use crate::mutate::{self, Random};

pub const TARGET: Target = Target {
    name: "template_source",
    seeds,
    mutate,
    run,
    // The output, while it grows.
    bounds: Bounds {
        memory: Linear { base: 4 * limits::MAX_RENDERED_PROMPT_BYTES as u64, per_byte: 4000 },
        work: Linear { base: 16 << 30, per_byte: 0 },
    },
    needs_system: false,
};

const WORDS: [&str; 64] = [
    "{{ ",
    " }}",
    "{% ",
    " %}",
    "{%- ",
    " -%}",
    "{# ",
    " #}",
    "for m in messages",
    "endfor",
    "if ",
    "elif ",
    "else",
    "endif",
    "set x = ",
    "set x",
    "endset",
    "macro f(a, b=1)",
    "endmacro",
    "call f()",
    "endcall",
    "block b",
    "endblock",
    "self.b()",
    "filter upper",
    "endfilter",
    "raw",
    "endraw",
    "with a = 1",
    "endwith",
    "generation",
    "endgeneration",
    "break",
    "continue",
    "recursive",
    "loop(m)",
    "loop.index",
    "include 'x'",
    "import 'x' as y",
    "extends 'x'",
    "do f()",
    "autoescape true",
    "messages",
    "message['content']",
    "[::-1]",
    "[1:]",
    ".strip()",
    ".split('a')",
    "| tojson",
    "| trim",
    "| length",
    "| list",
    "| items",
    "| first",
    "is defined",
    "is string",
    "not ",
    "range(1000)",
    "raise_exception('x')",
    "strftime_now('%Y')",
    "f(f(1))",
    "((((",
    "[[[[",
    "1e999",
];

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = ["chatml", "llama31", "mistral", "qwen3", "corners"]
        .into_iter()
        .map(|name| {
            let file = std::fs::read(fixtures("templates").join(format!("{name}.json")));
            let fixture: Value = serde_json::from_slice(&file.expect("fixture")).expect("fixture");
            fixture["template"].as_str().expect("a template").as_bytes().to_vec()
        })
        .collect();
    for source in [
        "{% macro f(a) %}{{ a }}{{ f(a) }}{% endmacro %}{{ f(1) }}",
        "{% block b %}{{ self.b() }}{% endblock %}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% for m in messages %}{{ m.content | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "{% generation %}{{ messages[-1]['content'].split(' ')[::-1] | list }}{% endgeneration %}",
    ] {
        seeds.push(source.as_bytes().to_vec());
    }
    seeds
}

fn mutate(source: &mut Vec<u8>, random: &mut Random) {
    mutate::text(source, &WORDS, random);
    source.truncate(8 << 10);
}

/// What can make of a value one that is longer than the source and the messages, or nested without end.
const MULTIPLIES: [&str; 14] = [
    "*",
    "~",
    "+",
    "%}%",
    "join",
    "replace",
    "indent",
    "format",
    "center",
    "namespace",
    "batch",
    "range",
    "lipsum",
    "dict(",
];

fn run(source: &[u8]) -> Outcome {
    let source = &*String::from_utf8_lossy(source);
    let template = match ChatTemplate::new(source, Map::new()) {
        Ok(template) => template,
        Err(error @ TextError::TemplateSyntax { .. }) => return Outcome::refused(error),
        Err(error) => panic!("{error}"),
    };
    if MULTIPLIES.iter().any(|word| source.contains(word)) {
        return Outcome::accepted("compiled");
    }
    let template = template.with_clock(Default::default()).expect("it was compiled before");
    let messages = [
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "a b c", "extra": {"k": [1, null, 2.5]}}),
    ];
    match template.render_chat(&messages, true) {
        Ok(text) => {
            assert!(text.len() <= limits::MAX_RENDERED_PROMPT_BYTES);
            Outcome::accepted("rendered")
        }
        Err(error) => Outcome::refused(error),
    }
}
