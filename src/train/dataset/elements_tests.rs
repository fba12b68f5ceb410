use serde_json::{Map, Value, json};

use super::*;

const VOCAB: usize = 200_000;

fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(crate::demo::model_file("tokenizer.json").unwrap()).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, Map::new()).unwrap()
}

fn demo_template() -> ChatTemplate {
    let config = crate::demo::model_file("tokenizer_config.json").unwrap();
    let config: Value = serde_json::from_slice(config).unwrap();
    ChatTemplate::from_config(&config, None).unwrap().unwrap()
}

fn options(mode: TargetMode) -> ElementOptions {
    ElementOptions { mode, cut: MassCut::default(), vocab: VOCAB }
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned(), ..Message::default() }
}

fn answer(ids: &[u32], top: Option<TopLogprobs>) -> Message {
    let content = "text that is not tokenised";
    Message { token_ids: Some(ids.to_vec()), top_logprobs: top, ..message("assistant", content) }
}

fn conversation(messages: Vec<Message>) -> Conversation {
    Conversation { messages, system_prompt: Some("unseen".to_owned()), ..Conversation::default() }
}

fn build(
    format: ChatFormat,
    mode: TargetMode,
    messages: Vec<Message>,
) -> Result<Element, RowError> {
    let tokenizer = tokenizer();
    ElementBuilder::new(&tokenizer, format, options(mode))?.element(3, &conversation(messages))
}

/// The teacher's own token with 0.9, another with 0.09 and a third that the mass of 0.99 leaves out.
fn top(ids: &[u32]) -> TopLogprobs {
    let ids: Vec<Vec<i64>> = ids.iter().map(|&id| vec![id.into(), 70, 71]).collect();
    let logprobs = vec![vec![0.9f32.ln(), 0.0901f32.ln(), 0.0099f32.ln()]; ids.len()];
    TopLogprobs::dense(&ids, &logprobs).unwrap()
}

#[test]
fn llama3_logits_follow_gen2() {
    let messages = vec![
        message("user", "Hi"),
        answer(&[50, 51], Some(top(&[50, 51]))),
        message("user", "Hi"),
        answer(&[60, 128_009], Some(top(&[60, 128_009]))),
    ];
    let hi = tokenizer().encode("Hi", false).unwrap();
    let user = [&[128_006, 882, 128_007, 271], &hi[..], &[128_009]].concat();
    let assistant = [128_006, 78_191, 128_007, 271];
    // The first answer was cut by its token limit and gets the end it lacks, without a target.
    let first = [&user[..], &assistant, &[50, 51]].concat();
    let second = [&first[..], &[128_009], &user, &assistant, &[60, 128_009]].concat();
    let element = build(ChatFormat::Llama3, TargetMode::Logits, messages).unwrap();
    assert_eq!(element.tokens, second);
    assert_eq!(element.row, 3);
    let (a, b) = (first.len() as u32 - 3, second.len() as u32 - 3);
    assert_eq!(element.targets.rows, [a, a, a + 1, a + 1, b, b, b + 1, b + 1]);
    assert_eq!(element.targets.ids, [50, 70, 51, 70, 60, 70, 128_009, 70]);
    assert!((element.targets.probs[0] - 0.9).abs() < 1e-6);
    assert_eq!(element.supervised, [a..a + 2, b..b + 2]);
    assert_eq!(element.supervised_rows().collect::<Vec<_>>(), [a, a + 1, b, b + 1]);
}

#[test]
fn qwen_writes_a_line_break_behind_an_end_that_is_not_the_last() {
    let messages =
        vec![answer(&[50, 151_645], None), answer(&[51], None), answer(&[52], Some(top(&[52])))];
    let element = build(ChatFormat::Qwen, TargetMode::Logits, messages).unwrap();
    let header = [151_644, 77_091, 198];
    let expected =
        [&header[..], &[50, 151_645, 198], &header, &[51, 151_645, 198], &header, &[52]].concat();
    assert_eq!(element.tokens, expected);
    assert_eq!(element.targets.rows, [expected.len() as u32 - 2; 2]);
}

#[test]
fn hard_labels_are_the_assistants_tokens_and_its_ends() {
    let messages = vec![message("user", "Hi"), answer(&[50], None), message("assistant", "Hi")];
    let element = build(ChatFormat::Qwen, TargetMode::Tokens, messages).unwrap();
    let tokenizer = tokenizer();
    let text = tokenizer.encode("text that is not tokenised", false).unwrap();
    let hi = tokenizer.encode("Hi", false).unwrap();
    let user = [&[151_644, 872, 198], &hi[..], &[151_645, 198]].concat();
    let header = [151_644, 77_091, 198];
    // Stored ids are not used: the message is tokenised again.
    let parts: [&[u32]; 7] =
        [&user, &header, &text, &[151_645, 198], &header, &hi, &[151_645, 198]];
    assert_eq!(element.tokens, parts.concat());
    let supervised: Vec<u32> = element.supervised_rows().collect();
    assert_eq!(element.targets.rows, supervised);
    let learned: Vec<u32> =
        supervised.iter().map(|row| element.tokens[*row as usize + 1]).collect();
    assert_eq!(element.targets.ids, learned);
    assert_eq!(learned, [&text[..], &[151_645, 198], &hi, &[151_645, 198]].concat());
    assert!(element.targets.probs.iter().all(|p| *p == 1.0));
}

#[test]
fn a_teacher_gets_answers_with_their_end_but_not_what_the_format_adds() {
    let messages = vec![message("user", "Hi"), message("assistant", "Hi"), answer(&[50], None)];
    let element = build(ChatFormat::Qwen, TargetMode::Teacher, messages).unwrap();
    assert!(element.targets.is_empty());
    let hi = tokenizer().encode("Hi", false).unwrap();
    let learned: Vec<u32> =
        element.supervised_rows().map(|row| element.tokens[row as usize + 1]).collect();
    assert_eq!(learned, [&hi[..], &[151_645, 50]].concat());
    // The stored answer may have been cut: it gets no end.
    assert_eq!(element.tokens.last(), Some(&50));
}

#[test]
fn the_template_gives_the_tokens_of_its_rendering() {
    let (tokenizer, template) = (tokenizer(), demo_template());
    let messages = vec![
        message("system", "Log"),
        message("user", "When?"),
        message("assistant", "At six."),
        message("user", "Why?"),
        message("assistant", "Tide."),
    ];
    let format = ChatFormat::Template(&template);
    let element = build(format, TargetMode::Tokens, messages.clone()).unwrap();
    let json: Vec<Value> =
        messages.iter().map(|m| json!({"role": m.role, "content": m.content})).collect();
    let text = template
        .render(&crate::text::TemplateRequest {
            messages: &json,
            tools: None,
            add_generation_prompt: false,
            continue_final_message: false,
            kwargs: &Map::new(),
        })
        .unwrap();
    assert_eq!(element.tokens, tokenizer.encode(&text, false).unwrap());
    let learned: Vec<u32> =
        element.supervised_rows().map(|row| element.tokens[row as usize + 1]).collect();
    assert_eq!(tokenizer.decode(&learned, false).unwrap(), "At six.<|im_end|>\nTide.<|im_end|>\n");

    // Stored ids take the place of the content.
    let stored = vec![message("user", "When?"), answer(&[50, 51, 2], Some(top(&[50, 51, 2])))];
    let element = build(format, TargetMode::Logits, stored).unwrap();
    let prompt = "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n";
    let prompt = tokenizer.encode(prompt, false).unwrap();
    assert_eq!(element.tokens, [&prompt[..], &[50, 51, 2]].concat());
    let begin = prompt.len() as u32 - 1;
    assert_eq!(element.supervised_rows().collect::<Vec<_>>(), [begin, begin + 1, begin + 2]);
}

/// Content that begins with a line break would join the one of the header into another token than the
/// model's prompt ends with.
#[test]
fn an_answer_that_begins_with_a_line_break_keeps_the_header_apart() {
    let template = demo_template();
    let messages = vec![message("user", "When?"), message("assistant", "\n\nAt six.")];
    let format = ChatFormat::Template(&template);
    let element = build(format, TargetMode::Tokens, messages).unwrap();
    let prompt = "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n";
    let prompt = tokenizer().encode(prompt, false).unwrap();
    assert!(element.tokens.starts_with(&prompt));
    assert_eq!(element.supervised[0].start as usize, prompt.len() - 1);
}

#[test]
fn templates_that_cannot_be_cut_are_refused() {
    // Writes the number of messages first: every message changes what stands before it.
    let counting = template(
        "{{ messages|length }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    );
    let e = build(ChatFormat::Template(&counting), TargetMode::Tokens, vec![]).unwrap_err();
    assert!(e.to_string().contains("message 1: the model's chat template writes earlier"), "{e}");
    let upper =
        template("{% for m in messages %}<|im_start|>{{ m.content|upper }}<|im_end|>{% endfor %}");
    let e = build(ChatFormat::Template(&upper), TargetMode::Tokens, vec![]).unwrap_err();
    assert!(matches!(e, RowError::Template { .. } | RowError::Text(_)), "{e}");
    // The space belongs to the token of the word behind it.
    let joined = template("{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}");
    let e = build(ChatFormat::Template(&joined), TargetMode::Tokens, vec![]).unwrap_err();
    assert!(e.to_string().contains("one by one"), "{e}");
}

#[test]
fn rows_that_cannot_be_learned_from_are_refused() {
    let q = || message("user", "Hi");
    let wide = TopLogprobs::dense(&[vec![VOCAB as i64]], &[vec![-0.1]]).unwrap();
    let plain = message("assistant", "Hi");
    let with = |ids: &[u32], top| vec![q(), answer(ids, Some(top))];
    let two = Message { top_logprobs: Some(top(&[1; 9])), ..plain.clone() };
    let vocab = |id| RowError::Vocabulary { message: 1, id, vocab: VOCAB };
    for (mode, messages, error) in [
        (TargetMode::Logits, vec![], RowError::NoMessages),
        (TargetMode::Logits, vec![q(), plain.clone()], RowError::NoLogprobs),
        (TargetMode::Logits, with(&[1], TopLogprobs::default()), RowError::NoLogprobs),
        (TargetMode::Tokens, vec![q()], RowError::NoAssistant),
        (TargetMode::Teacher, vec![q()], RowError::NoAssistant),
        (TargetMode::Logits, with(&[VOCAB as u32], top(&[1])), vocab(VOCAB as u32)),
        (TargetMode::Logits, with(&[1], wide), vocab(VOCAB as u32)),
        (
            TargetMode::Logits,
            with(&[1], top(&[1, 2])),
            RowError::TokenCount { message: 1, found: 2, tokens: 1 },
        ),
        (
            TargetMode::Logits,
            vec![q(), two],
            RowError::TokenCount {
                message: 1,
                found: 9,
                tokens: tokenizer().encode("Hi", false).unwrap().len(),
            },
        ),
        (
            TargetMode::Tokens,
            vec![message("tool", "x"), plain],
            RowError::Role { message: 0, role: "tool".to_owned() },
        ),
    ] {
        assert_eq!(build(ChatFormat::Llama3, mode, messages).unwrap_err(), error);
    }
    // Tokens mode needs no log-probabilities, and does not mind wrong ones.
    let messages = vec![q(), answer(&[VOCAB as u32], Some(top(&[1; 9])))];
    build(ChatFormat::Llama3, TargetMode::Tokens, messages).unwrap();
    let long = vec![q(), answer(&vec![1; MAX_ELEMENT_TOKENS], None)];
    let e = build(ChatFormat::Llama3, TargetMode::Teacher, long).unwrap_err();
    assert_eq!(e, RowError::TooLong);
}

#[test]
fn the_format_is_told_by_the_vocabulary() {
    let (tokenizer, template) = (tokenizer(), demo_template());
    assert!(matches!(
        ChatFormat::detect(&tokenizer, Some(&template)),
        Some(ChatFormat::Template(_))
    ));
    assert!(ChatFormat::detect(&tokenizer, None).is_none());
}
