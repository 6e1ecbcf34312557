// Runs the fuzz target without libFuzzer, for compilers that lack it: every file of the corpus, and then, for some
// seconds, random changes to them (not guided by coverage). Arguments: the folder, seconds.
#include <chrono>
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

void run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
}

std::string mutated(std::string text, const std::vector<std::string>& corpus, std::mt19937& random) {
  static const std::vector<std::string> words{"{", "}", "[", "]", "\"", ",", ":", "\\u", "\xFF", "18446744073709551615",
                                              "-1", "0", "null", "\"dtype\"", "\"shape\"", "\"data_offsets\"", "1e9"};
  for (unsigned changes = 1 + random() % 4; changes > 0; --changes) {
    const std::size_t at = random() % (text.size() + 1);
    switch (random() % 5) {
      case 0: text.insert(at, words[random() % words.size()]); break;
      case 1: text.erase(at, random() % 8); break;
      case 2: if (at < text.size()) text[at] = static_cast<char>(random()); break;
      case 3: text.insert(at, text.substr(at / 2, random() % 64)); break;
      default: {
        const std::string& other = corpus[random() % corpus.size()];
        text = text.substr(0, at) + other.substr(random() % (other.size() + 1));
      }
    }
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::vector<std::string> corpus;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
    std::ifstream file(entry.path(), std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  if (corpus.empty()) return 2;
  for (const std::string& input : corpus) run(input);
  std::mt19937 random(1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[2]));
  long inputs = 0;
  while (std::chrono::steady_clock::now() < end) {
    for (int i = 0; i < 1000; ++i, ++inputs) run(mutated(corpus[random() % corpus.size()], corpus, random));
  }
  std::printf("%zu files, %ld random inputs, no fault found\n", corpus.size(), inputs);
  return 0;
}
