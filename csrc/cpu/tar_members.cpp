// A shard's index is a walk over its headers: three to a sample, of 512 bytes each, so the walk is what counts. All that
// is not a plain file's header, and every complaint, is left to diffprune/tar_index.py.
#include "tar_members.h"

#include <algorithm>
#include <unordered_map>

namespace diffprune::cpu {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kSmall = kBlock;       // data of so many bytes are part of a stamp
constexpr size_t kMostTrusted = 10'000;  // or a hostile tar would fill the memory

// The number that `digits` octal digits at `text` and a NUL or space after them make, or -1.
int64_t octal(const char* text, int digits) {
  int64_t number = 0;
  for (int i = 0; i < digits; ++i) {
    if (text[i] < '0' || text[i] > '7') return -1;
    number = number * 8 + (text[i] - '0');
  }
  return text[digits] == '\0' || text[digits] == ' ' ? number : -1;
}

// What a header's bytes add up to, those of the checksum itself as spaces.
int64_t sum_of(const char* header) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < kBlock; ++i) sum += static_cast<unsigned char>(header[i]);
  for (int i = 148; i < 156; ++i) sum -= static_cast<unsigned char>(header[i]);
  return int64_t{sum} + 8 * ' ';
}

// Six digits and two NULs or spaces, as tar writes it; anything else is for Python to look at.
bool sum_is_right(const char* header) {
  return (header[155] == ' ' || header[155] == '\0') && octal(header + 148, 6) == sum_of(header);
}

constexpr std::array<uint32_t, 256> crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
    table[byte] = value;
  }
  return table;
}

// zlib's CRC-32 of what `before` is the CRC of, and then this text.
uint32_t crc32(std::string_view text, uint32_t before = 0) {
  static constexpr std::array<uint32_t, 256> table = crc_table();
  uint32_t value = ~before;
  for (const unsigned char c : text) value = table[(value ^ c) & 255] ^ (value >> 8);
  return ~value;
}

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return c < 128; });
}

bool has_controls(std::string_view text) {
  return std::any_of(text.begin(), text.end(), [](unsigned char c) { return c < 32; });
}

std::string owner_of(std::string_view header) {
  return std::string(header.substr(100, 24)).append(header.substr(329, 16));
}

std::string lower(std::string_view text) {
  std::string lowered(text);
  for (char& c : lowered) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  return lowered;
}

int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

}  // namespace

std::pair<int64_t, int64_t> TarMembers::take(std::string_view window, int64_t base, int64_t offset, int64_t size) {
  int64_t widest = 0;
  while (offset >= base && offset - base + kBlock <= static_cast<int64_t>(window.size())) {
    const std::string_view header = window.substr(static_cast<size_t>(offset - base), kBlock);
    const char* bytes = header.data();
    const int64_t length = octal(bytes + 124, 11), time = octal(bytes + 136, 11);
    const size_t name_end = header.find('\0');
    if (bytes[156] != '0' || bytes[345] != 0 || length < 0 || time < 0 || name_end > 100) break;
    const int64_t body = offset + kBlock;
    if (body > size || length > size - body || !sum_is_right(bytes)) break;
    if (last_trusted_.compare(0, 24, bytes + 100, 24) != 0 || last_trusted_.compare(24, 16, bytes + 329, 16) != 0) {
      std::string owner = owner_of(header);
      if (trusted_.find(owner) == trusted_.end()) break;
      last_trusted_ = std::move(owner);
    }
    const std::string_view name = header.substr(0, name_end);
    if (!is_ascii(name)) break;
    uint32_t stamp = crc32(header.substr(136, 12));
    if (length <= kSmall) {
      const std::string_view data = window.substr(static_cast<size_t>(body - base), static_cast<size_t>(length));
      if (static_cast<int64_t>(data.size()) < length) break;
      stamp = crc32(data, stamp);
    }
    add(name, offset, body, length, stamp);
    const int64_t next = body + padded(length);
    widest = std::max(widest, next - offset);
    offset = next;
  }
  return {offset, widest};
}

void TarMembers::add(std::string_view name, int64_t header_offset, int64_t data_offset, int64_t size, uint32_t stamp) {
  names_.append(name);
  name_ends_.push_back(names_.size());
  const int64_t values[] = {header_offset, data_offset, size};
  for (size_t i = 0; i < 3; ++i) places_[i].push_back(values[i]);
  stamps_.push_back(stamp);
}

void TarMembers::trust(std::string_view header) {
  if (trusted_.size() < kMostTrusted) trusted_.insert(owner_of(header));
}

std::optional<Samples> TarMembers::grouped() const {
  Samples found;
  found.places = places_;
  found.stamps = stamps_;
  found.codes.reserve(name_ends_.size());
  std::unordered_map<std::string_view, int32_t> codes;      // of extensions as they are spelt
  std::unordered_map<std::string, int32_t> lowered_codes;   // and in lower case
  std::vector<int32_t> lowered;                             // the second of the first
  std::vector<size_t> last_seen;                            // of the second: the sample that had it last, from 1
  std::unordered_set<std::string_view> keys;
  std::string_view key;
  for (size_t member = 0; member < name_ends_.size(); ++member) {
    const std::string_view whole = name(member);
    const size_t slash = whole.rfind('/'), start = slash == std::string_view::npos ? 0 : slash + 1;
    const size_t dot = whole.find('.', start);
    if (dot == std::string_view::npos || dot == start || whole.substr(0, 2) == "__") return {};
    if (!is_ascii(whole) || has_controls(whole)) return {};
    const std::string_view its_key = whole.substr(0, dot), extension = whole.substr(dot + 1);
    const auto [known, is_new] = codes.emplace(extension, static_cast<int32_t>(lowered.size()));
    if (is_new) {
      found.extensions.emplace_back(extension);
      lowered.push_back(lowered_codes.emplace(lower(extension), static_cast<int32_t>(lowered_codes.size())).first->second);
    }
    last_seen.resize(lowered_codes.size());
    const int32_t code = known->second;
    if (member == 0 || its_key != key) {
      if (!keys.insert(its_key).second) return {};
      key = its_key;
      found.first.push_back(static_cast<int64_t>(member));
      found.keys.append(key);
      found.key_ends.push_back(static_cast<int64_t>(found.keys.size()));
    } else if (places_[0][member] != places_[1][member - 1] + padded(places_[2][member - 1])) {
      return {};
    }
    size_t& last = last_seen[static_cast<size_t>(lowered[static_cast<size_t>(code)])];
    if (last == found.first.size()) return {};
    last = found.first.size();
    found.codes.push_back(code);
  }
  return found;
}

std::vector<std::tuple<std::string_view, int64_t, int64_t, int64_t, uint32_t>> TarMembers::members() const {
  std::vector<std::tuple<std::string_view, int64_t, int64_t, int64_t, uint32_t>> all;
  for (size_t i = 0; i < name_ends_.size(); ++i) {
    all.emplace_back(name(i), places_[0][i], places_[1][i], places_[2][i], stamps_[i]);
  }
  return all;
}

std::string_view TarMembers::name(size_t member) const {
  const size_t start = member ? name_ends_[member - 1] : 0;
  return std::string_view(names_).substr(start, name_ends_[member] - start);
}

}  // namespace diffprune::cpu
