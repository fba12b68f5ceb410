//! The built-in demo: a small model that recalls facts from its context, two documents, an
//! exact and a trained cartridge of each.
//!
//! Everything is embedded in the binary, so that the first start needs no download.

use serde::Deserialize;

/// Name the demo model is served under.
pub const MODEL_NAME: &str = "cartouche-demo";

/// A demo document with its held-out questions and the cartridge that stands for it.
#[derive(Debug)]
pub struct Document {
    /// Also the id of its cartridge.
    pub name: &'static str,
    pub text: &'static str,
    questions: &'static str,
    /// Questions to train a cartridge with, in other phrasings than the held-out ones: a line each.
    pub training_questions: &'static str,
    /// A cartridge file: the exact keys and values of the document.
    pub cartridge: &'static [u8],
    /// The id of [`Self::trained`].
    pub trained_name: &'static str,
    /// A cartridge file, learned, a twentieth of the size.
    pub trained: &'static [u8],
}

macro_rules! document {
    ($name:literal) => {
        Document {
            name: $name,
            text: include_str!(concat!("../assets/demo/documents/", $name, "/document.txt")),
            questions: include_str!(concat!("../assets/demo/documents/", $name, "/questions.json")),
            training_questions: include_str!(concat!(
                "../assets/demo/documents/",
                $name,
                "/training_questions.jsonl"
            )),
            cartridge: include_bytes!(concat!("../assets/demo/cartridges/", $name, ".safetensors")),
            trained_name: concat!($name, "-small"),
            trained: include_bytes!(concat!(
                "../assets/demo/cartridges/",
                $name,
                "-small.safetensors"
            )),
        }
    };
}

/// The documents, the one shown to newcomers first.
pub const DOCUMENTS: &[Document] = &[document!("harbour-log"), document!("expedition")];

/// Questions about one document.
#[derive(Debug, Deserialize)]
pub struct Questions {
    pub title: String,
    /// The whole answer to a question that cannot be answered.
    pub refusal: String,
    pub questions: Vec<Question>,
}

#[derive(Debug, Deserialize)]
pub struct Question {
    pub question: String,
    /// The exact answer, or the refusal.
    pub answer: String,
    /// Whether the document holds the answer.
    pub in_document: bool,
}

impl Document {
    /// The questions; an error means the embedded file is broken.
    pub fn questions(&self) -> Result<Questions, serde_json::Error> {
        serde_json::from_str(self.questions)
    }
}

impl Questions {
    /// The question shown to newcomers.
    pub fn first(&self) -> Option<&Question> {
        let mut known = self.questions.iter().filter(|q| q.in_document);
        known.find(|q| q.question.ends_with('?'))
    }
}

/// A file of the demo model by its name in the repository.
pub fn model_file(name: &str) -> Option<&'static [u8]> {
    Some(match name {
        "config.json" => include_bytes!("../assets/demo/model/config.json"),
        "generation_config.json" => include_bytes!("../assets/demo/model/generation_config.json"),
        "model.safetensors" => include_bytes!("../assets/demo/model/model.safetensors"),
        "tokenizer.json" => include_bytes!("../assets/demo/model/tokenizer.json"),
        "tokenizer_config.json" => include_bytes!("../assets/demo/model/tokenizer_config.json"),
        _ => return None,
    })
}
